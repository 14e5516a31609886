"""Where a run holds its model: what the recipe asks for, or what fits."""

from __future__ import annotations

import logging
from functools import cache

import torch

from losa.distributed.launch import as_launched
from losa.distributed.processes import launched, on_main, process_count
from losa.recipe.sections import Recipe
from losa.run.machine import capacity
from losa.run.placement import Placement, check_shards, choose
from losa.run.planned import Planned, needs_whole, planned_model

logger = logging.getLogger("losa")


def placement_of(recipe: Recipe, device: str) -> Placement:
    """The placement of this run, the same in every process. All processes call it together.

    Mode "auto" takes whole models where they fit into process 0's GPU and its machine's memory, a fifth more than an
    estimate counts (``losa.run.planned.MARGIN``), and else shards, with a warning where shards leave no such margin.
    With ``accelerate launch --use_fsdp`` it takes shards.

    Args:
        device: what this process computes on.

    Raises:
        RecipeError: as ``choose`` and ``check_shards``.
        ModelError: in mode "auto": the configuration cannot be had, or the model has no blocks.
        LosaError: in the other processes, where process 0 fails.
    """
    config, per_machine = as_launched(recipe.distributed), on_main(lambda: launched().local_count)
    planned = cache(lambda: planned_on(recipe, device))
    placement = choose(
        config,
        process_count(),
        per_machine,
        lambda found: on_main(lambda: _fits(planned(), found, per_machine)),
        needs_whole(recipe),
    )
    check_shards(recipe, placement)
    if config.mode == "auto" and placement.sharded and not placement.offload:
        on_main(lambda: _warn_unless_it_fits(planned(), placement, per_machine))
    return placement


def planned_on(recipe: Recipe, device: str) -> Planned:
    """The recipe with what there is for a process that computes on ``device``. Raises RecipeError, ModelError: as
    ``planned_model`` and ``Planned.of``."""
    on = torch.device(device)
    return Planned.of(recipe, planned_model(recipe), on, capacity(on))


def _fits(planned: Planned, placement: Placement, per_machine: int) -> bool:
    """Whether a placement fits. Memory that is not known is left to the user, who knows the settings."""
    memory = planned.capacity
    if "device" in memory and planned.shape.on_gpu and planned.needed(placement) > memory["device"]:
        return False
    if "process" in memory and planned.needed_by_machine(placement, 1) > memory["process"]:
        return False
    return "host" not in memory or planned.needed_by_machine(placement, per_machine) <= memory["host"]


def _warn_unless_it_fits(planned: Planned, placement: Placement, per_machine: int) -> None:
    if not _fits(planned, placement, per_machine):
        logger.warning(
            "distributed.mode: auto takes %s, but by an estimate the run needs more memory than there is; `losa plan "
            "RECIPE --gpus %d` shows how much, and names settings that need less",
            placement.mode,
            placement.processes,
        )
