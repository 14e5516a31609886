"""A small recipe whose plan can be counted by hand."""

from __future__ import annotations

from losa.recipe.reading import parse_recipe


def recipe(model, **changes):
    settings = {
        "model": str(model),
        "output": "out",
        "device": "cpu",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt", "samples": 4, "length": 16, "cka_samples": 3, "batch_size": 2},
        "train": {"data": "t.txt", "length": 16, "batch_size": 2, "max_tokens": 160},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "rounds": {"count": 2},
        "lora": {"rank": 3},
    }
    for key, value in changes.items():
        settings[key] = settings.get(key) | value if isinstance(value, dict) and settings.get(key) else value
    return parse_recipe(settings)
