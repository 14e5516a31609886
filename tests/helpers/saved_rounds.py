"""A wrapped model as rounds leave it, and its saver."""

from __future__ import annotations

from pathlib import Path

import torch

from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.machines import CheckpointConfig
from losa.record import RoundRecord
from losa.run.saving import Saver
from losa.training.position import Position, TrainState
from tests.helpers.tiny import tiny_llama

PARTS = ("weight", "mask", "lora_A", "lora_B")
OWNER = {"recipe": {"prune": {"sparsity": 0.5}, "seed": 0}, "inputs": {"model weights": "a"}}


def saver(directory: Path, model, owner=OWNER, **config) -> Saver:
    return Saver("losa", directory, model, None, owner, CheckpointConfig(**config))


def records(count: int) -> list[RoundRecord]:
    return [RoundRecord(i + 1, 0.5, 2.0, [0.5], [2], perplexity=0.1 + 0.2) for i in range(count)]


def at_step(model, step: int) -> TrainState:
    """As if ``model`` had been trained for so many steps."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moments = {f"{name}.exp_avg": torch.full_like(model.get_parameter(name), step).detach() for name in names}
    return TrainState(Position(step, step, 7 * step, 0.1 * step, 1.5), moments)


def wrapped(layer=MaskedLoRALinear, **settings):
    model = tiny_llama(layers=2, **settings)
    wrap_model(model, layer=layer, rank=2, scaling=2.0)
    return model


def train(model, seed=0):
    """Give every layer what a round would: mask, another rank, values, and some a replaced weight."""
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(wrapped_linears(model).values()):
        layer.set_rank(1 + index % 5)
        if index % 3 == 0:
            layer.replace_weight(torch.randn(layer.weight.shape, generator=generator))
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.5)
    return step(model, generator)


def step(model, generator):
    for layer in wrapped_linears(model).values():
        with torch.no_grad():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return model


def state_of(model):
    return {(n, part): getattr(m, part).detach().clone() for n, m in wrapped_linears(model).items() for part in PARTS}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def names(directory):
    return sorted(path.name for path in directory.iterdir())
