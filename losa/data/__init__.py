"""From rows of text to tokens."""
