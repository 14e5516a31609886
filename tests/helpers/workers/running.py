"""For ``tests/losa/test_distributed.py``: whole runs of a recipe, by one process and by two."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from losa.recipe.reading import parse_recipe
from losa.run.pipeline import run_recipe
from tests.helpers.processes import finish, start_worker

TEXT = "The quick brown fox jumps over the lazy dog and back again.\n"
# By number of processes: what they run, and in which batches. An optimiser step has 4 sequences.
CASES = {1: {"one": ("auto", 4)}, 2: {"ddp": ("ddp", 2), "fsdp": ("fsdp", 2)}}


def recipe(directory: Path, name: str, mode: str, batch_size: int) -> dict:
    """Of a model and a text in ``directory``."""
    text = {"data": str(directory / "text.txt")}
    return {
        "model": str(directory / "model"),
        "output": str(directory / name),
        "device": "cpu",
        "prune": {"sparsity": 0.5, "pruner": "sparsegpt"},
        "rounds": {"count": 2},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "lora": {"rank": 2},
        "calibration": text | {"samples": 4, "length": 16, "cka_samples": 4},
        "train": text | {"length": 16, "batch_size": batch_size, "max_tokens": 16 * 24, "learning_rate": 5e-3},
        "evaluate": text | {"length": 32, "max_windows": 4},
        "distributed": {"mode": mode},
    }


def main(directory: Path) -> None:
    start_worker()
    for name, (mode, batch_size) in CASES[dist.get_world_size()].items():
        run_recipe(parse_recipe(recipe(directory, name, mode, batch_size)))
    finish(None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
