"""Where a run holds its model: what the recipe asks for, or what fits."""

from __future__ import annotations

import torch

from losa.distributed.launch import as_launched
from losa.distributed.processes import launched, on_main, process_count
from losa.recipe.sections import Recipe
from losa.run.machine import capacity
from losa.run.placement import Placement, choose
from losa.run.planned import Planned, planned_model


def placement_of(recipe: Recipe, device: str) -> Placement:
    """The placement of this run, the same in every process. All processes call it together.

    Mode "auto" takes whole models where they fit into what process 0 has, a fifth more than an estimate counts
    (``losa.run.planned.MARGIN``); with ``accelerate launch --use_fsdp`` it takes shards.

    Args:
        device: what this process computes on.

    Raises:
        RecipeError: as ``choose``.
        ModelError: in mode "auto": the configuration cannot be had, or the model has no blocks.
        LosaError: in the other processes, where process 0 fails.
    """
    config, per_machine = as_launched(recipe.distributed), on_main(lambda: launched().local_count)
    return choose(
        config, process_count(), per_machine, lambda found: on_main(lambda: _fits(recipe, device, found, per_machine))
    )


def _fits(recipe: Recipe, device: str, placement: Placement, per_machine: int) -> bool:
    on = torch.device(device)
    memory = capacity(on)
    if "host" in memory:
        memory["host"] //= per_machine
    planned = Planned.of(recipe, planned_model(recipe), on, memory)
    place = planned.shape.computes_on
    # A device whose memory is not known is left to the user, who knows the settings.
    return place not in memory or planned.needed(placement) <= memory[place]
