"""A recipe with all that an estimate needs to know of it, and what it holds wherever the model is placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from losa.algorithm import gradients
from losa.algorithm.schedule import Round
from losa.model.loading import configured_model
from losa.pruners import get_pruner
from losa.recipe.methods import METHODS, MethodName, check_packages
from losa.recipe.reading import override, parse_recipe
from losa.recipe.sections import Recipe
from losa.run.estimate_memory import holdings
from losa.run.estimate_offloaded import offloaded_holdings
from losa.run.estimate_sharded import sharded_holdings
from losa.run.holding import Holding, machine_sums, phase_sums
from losa.run.model_shape import ModelShape
from losa.run.placement import Placement
from losa.run.pruning import check_prunable, check_pruner
from losa.run.rounds import rounds_of

# Memory that is needed for each byte that is counted: the allocator's slack, CUDA's own memory, and data come on top.
MARGIN = 1.2


@dataclass(frozen=True)
class Planned:
    """``rounds``: of every method, with 0 sequences where the recipe leaves their number open. ``capacity``: bytes of
    memory of one process by place, where known."""

    recipe: Recipe
    shape: ModelShape
    rounds: dict[MethodName, list[Round]]
    capacity: dict[str, int]

    @classmethod
    def of(cls, recipe: Recipe, model: nn.Module, device: torch.device, capacity: dict[str, int]) -> Planned:
        """Arguments: of ``planned_model``, and the device that the run computes on. Raises as ``ModelShape.of``."""
        train = recipe.train
        sequences = 0 if train is None or train.max_tokens is None else train.max_tokens // train.length
        # In the order in which the recipe names the methods.
        names = dict.fromkeys([*recipe.compare, recipe.method])
        rounds = {name: rounds_of(name, recipe, sequences) for name in names}
        return cls(recipe, ModelShape.of(model, recipe, device), rounds, capacity)

    @property
    def train_length(self) -> int:
        """Tokens of a sequence that the main method trains on; 0 without training."""
        trains = METHODS[self.recipe.method].trains
        return self.recipe.train.length if self.recipe.train is not None and trains else 0

    def on(self, placement: Placement) -> Planned:
        """As a placement runs it: a sharded model has an activation_checkpointing of its own."""
        own = self.recipe.distributed.activation_checkpointing
        if own is None or not placement.sharded or self.recipe.train is None:
            return self
        return self.changed({"train.activation_checkpointing": own})

    def holdings(self, placement: Placement) -> list[Holding]:
        """Everything that losa itself holds in the process that holds most."""
        recipe = self.on(placement).recipe
        if recipe.offload is not None:
            return offloaded_holdings(recipe, self.shape, self.rounds, self.capacity)
        if placement.sharded:
            return sharded_holdings(recipe, self.shape, self.rounds, self.capacity, placement)
        return holdings(recipe, self.shape, self.rounds, self.capacity, placement.processes)

    def needed(self, placement: Placement) -> float:
        """Memory of one process where it computes, the margin included."""
        return MARGIN * max(phase_sums(self.holdings(placement), self.shape.computes_on).values())

    def needed_by_machine(self, placement: Placement, processes: int) -> float:
        """Host memory of a machine with so many processes, the margin included."""
        return MARGIN * max(machine_sums(self.holdings(placement), processes).values())

    def changed(self, settings: Mapping[str, Any]) -> Planned:
        """With other settings, by dotted name, that change neither the model nor the rounds. Raises RecipeError: a
        recipe cannot have them."""
        return replace(self, recipe=parse_recipe(override(self.recipe.model_dump(), dict(settings)), "plan"))


def needs_whole(recipe: Recipe) -> str | None:
    """The setting of a recipe that takes gradients of the whole model, if there is one. Raises RecipeError: an unknown
    pruner or statistic."""
    allocations = map(recipe.allocation_of, recipe.methods)
    found = (gradients.needs_whole(recipe.prune, each, get_pruner(recipe.prune)) for each in allocations)
    return next(filter(None, found), None)


def planned_model(recipe: Recipe) -> nn.Module:
    """The recipe's model on the meta device.

    Raises:
        RecipeError: as ``check_pruner``, or a method whose package is missing.
        ModelError: the configuration cannot be had, or as ``check_prunable``.
    """
    check_pruner(recipe)  # a wrong name should not wait for a download
    check_packages(recipe.methods)
    model = configured_model(
        recipe.model, gguf_file=recipe.gguf_file, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code
    )
    check_prunable(recipe, model)
    return model
