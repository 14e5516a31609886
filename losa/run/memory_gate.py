"""A run that needs more memory than there is, told before it has loaded anything."""

from __future__ import annotations

import logging
from contextlib import suppress

from rich.console import Console

from losa.distributed.processes import launched, on_main, process_count
from losa.errors import LosaError
from losa.model.loading import torch_device
from losa.output.tables import show_table
from losa.recipe.sections import Recipe
from losa.run.choice import planned_on
from losa.run.estimate import Estimate, estimate
from losa.run.estimate_tables import memory_table, size_text
from losa.run.holding import machine_sums, phase_sums
from losa.run.offloaded import check_offload
from losa.run.placement import Placement

logger = logging.getLogger("losa")


def check_memory(recipe: Recipe, placement: Placement, device: str, console: Console) -> None:
    """Look at the run's plan, and show it where the run does not fit: what it is certain to hold is more than there is.
    What it may hold besides is warned of. Several processes look at the plan of the one that holds most, all of them
    together.

    Args:
        device: what this process computes on.

    Raises:
        ModelError: no such device.
        LosaError: the plan asks for more than the memory of the machine, or of a GPU.
    """
    if process_count() > 1:
        machine = launched().local_count
        on_main(lambda: _check_processes(recipe, placement, device, machine))
        return
    torch_device(recipe.device)
    try:
        plan = estimate(recipe, probe=False)
    except Exception as error:
        _say_no_plan(error)
        return
    for place, there in plan.capacity.items():
        size, phase = plan.peak(place, certain=True)
        where = "the host" if place == "host" else plan.device
        if size > there:
            show_table(memory_table(plan), console)
            raise _refusal(size, there, phase, f"the run holds at least {{}} on {where}", _advice(recipe))
        size, phase = plan.peak(place)
        if size > there and place == _computes_on(plan):
            logger.warning(
                "memory: in the phase %s the run holds up to %s on %s by its plan, and there are %s; `losa plan` shows "
                "what takes it",
                phase,
                size_text(size),
                where,
                size_text(there),
            )


def _check_processes(recipe: Recipe, placement: Placement, device: str, per_machine: int) -> None:
    try:
        plan = planned_on(recipe, device)
        held = [holding for holding in plan.holdings(placement) if holding.certain]
    except Exception as error:
        _say_no_plan(error)
        return
    sums = {"device": phase_sums(held, "device"), "host": machine_sums(held, per_machine)}
    for place, there in plan.capacity.items():
        phase = max(sums[place], key=sums[place].__getitem__)
        who = f"the {per_machine} processes of a machine hold" if place == "host" else "a process holds"
        where = "its host" if place == "host" else "its GPU"
        advice = f"`losa plan RECIPE --gpus {placement.processes}` shows what takes it, and what needs less"
        if sums[place][phase] > there:
            raise _refusal(sums[place][phase], there, phase, f"{who} at least {{}} on {where}", advice)


def _say_no_plan(error: Exception) -> None:
    """Of the recipe or the model: the run says it too, where it meets it."""
    logger.debug("the run has no plan: %s", error)


def _refusal(size: int, there: int, phase: str, held: str, advice: str) -> LosaError:
    return LosaError(
        f"memory: in the phase {phase} {held.format(size_text(size))} by its plan, and there are {size_text(there)}; "
        f"{advice}; --force goes on all the same"
    )


def _computes_on(plan: Estimate) -> str:
    return "device" if "device" in plan.capacity else "host"


def _advice(recipe: Recipe) -> str:
    offloaded = recipe.model_copy(update={"offload": "disk"})
    with suppress(LosaError):
        if recipe.offload is None and list(recipe.methods) == ["prune_only"] and recipe.gguf_file is None:
            check_offload(offloaded)
            return "offload: disk (--offload disk) holds one block of the model at a time"
    return "the table says what takes it"
