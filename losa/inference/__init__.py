"""Text and speed from a model's zeros."""
