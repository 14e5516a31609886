"""For ``tests/losa/test_distributed.py``: whole runs of a recipe, by one process and by several."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from losa.model.sharded_loading import load_sharded
from losa.output import export
from losa.recipe.reading import parse_recipe
from losa.run import pipeline
from tests.helpers.processes import finish, start_worker

TEXT = "The quick brown fox jumps over the lazy dog and back again.\n"
# By number of processes: how they hold the model in each run.
CASES: dict[int, dict[str, dict]] = {
    1: {"one": {}, "one in shards": {"mode": "fsdp", "cpu_offload": True}},
    2: {"ddp": {"mode": "ddp"}, "fsdp": {"mode": "fsdp"}},
    4: {"hsdp": {"mode": "hsdp", "shard_size": 2}},
}
# Runs of a mixture of experts, by two methods.
EXPERTS: dict[int, dict[str, dict]] = {
    1: {"experts": {}, "experts in shards": {"mode": "fsdp", "cpu_offload": True}},
    2: {"experts, fsdp": {"mode": "fsdp"}},
}
# Runs of a structured pruner, whose output is a smaller model.
SMALLER: dict[int, dict[str, dict]] = {1: {"smaller": {}}, 2: {"smaller, fsdp": {"mode": "fsdp"}}}


def smaller(recipe: dict) -> dict:
    """``recipe`` with a structured pruner, and nothing else that takes time."""
    pruned = {"prune": {"sparsity": 0.5, "pruner": "wanda_sp"}, "method": "prune_only"}
    return recipe | pruned | {"train": None, "evaluate": None}


def of_experts(recipe: dict, directory: Path) -> dict:
    """``recipe`` for the mixture in ``directory``, and another method before its own."""
    return recipe | {"model": str(directory / "mixture"), "compare": ["prune_only"]}


def recipe(directory: Path, name: str, distributed: dict, processes: int) -> dict:
    """Of a model and a text in ``directory``. An optimiser step has 4 sequences."""
    text = {"data": str(directory / "text.txt")}
    training = {"max_tokens": 16 * 24, "learning_rate": 5e-3, "norms": 0.5, "distill": {"weight": 0.5}}
    return {
        "model": str(directory / "model"),
        "output": str(directory / name),
        "device": "cpu",
        "prune": {"sparsity": 0.5, "pruner": "sparsegpt"},
        "rounds": {"count": 2},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "lora": {"rank": 2},
        "calibration": text | {"samples": 4, "length": 16, "cka_samples": 4},
        "train": text | training | {"length": 16, "batch_size": 4 // processes},
        "evaluate": text | {"length": 32, "max_windows": 4},
        "distributed": distributed,
    }


def main(directory: str) -> None:
    start_worker()
    processes = dist.get_world_size()
    draw, export.write_figures = export.write_figures, lambda *_: []  # pictures take most of the time
    for name, distributed in SMALLER.get(processes, {}).items():
        pipeline.run_recipe(parse_recipe(smaller(recipe(Path(directory), name, distributed, processes))))
    for name, distributed in EXPERTS.get(processes, {}).items():
        made = recipe(Path(directory), name, distributed, processes)
        pipeline.run_recipe(parse_recipe(of_experts(made, Path(directory))))
    export.write_figures = draw
    held: dict[str, list] = {name: [] for name in CASES[processes]}
    for name, distributed in CASES[processes].items():

        def load(model, sharding, name=name, real=load_sharded, **how):
            held[name] += [list(sharding.mesh.shape), sharding.offload]
            return real(model, sharding, **how)

        pipeline.load_sharded = load
        pipeline.run_recipe(parse_recipe(recipe(Path(directory), name, distributed, processes)))
    finish(held)
