"""Tests; ``python -m pytest`` from the project's root."""
