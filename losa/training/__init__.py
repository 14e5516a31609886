"""Fine-tuning: the loop, its loss, its number types and what it writes down."""
