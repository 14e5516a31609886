"""Recipes that a tiny model runs in seconds."""

from __future__ import annotations


def settings(workspace, output, **changes) -> dict:
    """A recipe for the model and the text of ``workspace``; ``changes`` replace whole sections."""
    text = str(workspace / "text.txt")
    base = {
        "model": str(workspace / "model"),
        "output": str(output),
        "device": "cpu",
        "prune": {"sparsity": 0.5},
        "rounds": {"count": 2},
        "allocation": {"mean_rank": 2, "rank_max": 6},
        "lora": {"rank": 3},
        "calibration": {"data": text, "samples": 4, "length": 32, "cka_samples": 4, "batch_size": 2},
        "train": {"data": text, "length": 32, "batch_size": 2, "max_tokens": 32 * 12, "learning_rate": 5e-3},
        "evaluate": {"data": text, "length": 64, "max_windows": 8},
    }
    return base | changes
