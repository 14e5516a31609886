"""Checkpoints without their zeros."""
