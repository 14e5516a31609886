"""A method's rounds on a tiny model in memory, and what must be the same after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from losa.distributed.sharding import gathered_calls, whole
from losa.model.blocks import find_blocks
from losa.recipe.reading import parse_recipe
from losa.run.fingerprint import tensor_digest
from losa.run.inputs import Inputs
from losa.run.methods import MethodRun, Outcome
from losa.training.metrics import METRICS
from tests.helpers.tiny import logits, tiny_llama
from tests.helpers.training import LENGTH, sequences


def method_run(
    directory: Path,
    method: str = "losa",
    dropout: float = 0.1,
    sequences_in_all: int = 18,
    processes: int | None = None,
    layers: int = 2,
    model: nn.Module | None = None,
    **changes,
) -> MethodRun:
    """Two rounds of 3 and 6 steps, saved after each step. ``model``: instead of a tiny LLaMA of so many ``layers``;
    ``changes``: of the recipe's sections."""
    text = {"data": "text.txt"}
    settings = {
        "model": "tiny",
        "output": str(directory / "out"),
        "method": method,
        "prune": {"sparsity": 0.5},
        "rounds": {"count": 2},
        "allocation": {"mean_rank": 2, "rank_max": 6},
        "lora": {"rank": 3, "dropout": dropout},
        "calibration": text | {"samples": 2, "length": LENGTH, "cka_samples": 2},
        "train": text | {"length": LENGTH, "batch_size": 2, "learning_rate": 1e-2, "round_share": 1 / 3},
        "evaluate": text | {"length": LENGTH},
        "checkpoint": {"every_steps": 1},
    }
    for key, value in changes.items():
        settings[key] = settings.get(key, {}) | value
    ids, data = sequences(2, seed=1).input_ids, sequences(sequences_in_all)
    inputs = Inputs(ids, data, evaluate)
    model, recipe = tiny_llama(layers=layers) if model is None else model, parse_recipe(settings)
    return MethodRun(method, model, recipe, inputs, directory, processes, log=lambda line: None)


def evaluate(model) -> float:
    """Stands for a perplexity."""
    with gathered_calls(model, find_blocks(model)):
        return float(logits(model).double().square().mean())


def result(run: MethodRun, outcome: Outcome) -> list:
    """Weights and masks to the bit, and all that was measured but times, as JSON. Processes that hold the model
    together call it together."""
    rounds = [vars(record) | {"seconds": sorted(record.seconds)} for record in outcome.rounds]
    digest = {name: tensor_digest(whole(tensor)) for name, tensor in run.model.state_dict().items()}
    masks = {name: tensor_digest(whole(mask)) for name, mask in outcome.masks.items()}
    measured = vars(outcome.result) | {"seconds": None}
    return json.loads(json.dumps([digest, masks, rounds, measured, losses(run.work_dir)]))


def losses(work_dir: Path) -> list[list[float]]:
    """Step, loss and norm of the gradient of each line of metrics."""
    lines = map(json.loads, (work_dir / METRICS).read_text().splitlines())
    return [[line["step"], line["loss"], line["grad_norm"]] for line in lines]
