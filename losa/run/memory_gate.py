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
from losa.run.estimate_tables import holdings_table, size_text
from losa.run.holding import Holding, machine_sums, phase_sums
from losa.run.offloaded import check_offload
from losa.run.placement import Placement
from losa.run.planned import Planned

logger = logging.getLogger("losa")

# Where memory is, in a message: of a run in one process and of several.
_PLACES = {"device": ("the GPU", "a GPU"), "host": ("the host", "a machine's host"), "process": ("the host",) * 2}


def check_memory(recipe: Recipe, placement: Placement, device: str, console: Console) -> None:
    """Look at the run's plan, and show it where the run does not fit: what it is certain to hold is more than there is.
    What it may hold besides is warned of. All processes call it together. The main process judges what one process
    holds on its GPU, and what all processes of a machine hold on their host.

    Args:
        placement: of the model in the run's processes.
        device: what this process computes on.
        console: gets the plan.

    Raises:
        ModelError: no such device.
        LosaError: in every process, where the plan asks for more than the memory of the machine or of a GPU, or than a
            process may have.
    """
    torch_device(recipe.device)
    machine = launched().local_count if process_count() > 1 else 1
    on_main(lambda: _check(recipe, placement, device, console, machine))


def _check(recipe: Recipe, placement: Placement, device: str, console: Console, per_machine: int) -> None:
    try:
        plan = planned_on(recipe, device)
        held = plan.holdings(placement)
    except Exception as error:  # of the recipe or the model: the run says it too, where it meets it
        logger.debug("the run has no plan: %s", error)
        return
    several = placement.processes > 1
    who = f"the {per_machine} processes of a machine hold" if several and per_machine > 1 else "a process holds"
    for place, there in plan.capacity.items():
        where = _PLACES[place][several]
        subject = "the run holds" if not several else who if place == "host" else "a process holds"
        size, phase = _most([holding for holding in held if holding.certain], place, per_machine)
        if size > there:
            show_table(holdings_table(held, plan.shape.device.type), console)
            raise LosaError(
                f"memory: in the phase {phase} {subject} at least {size_text(size)} on {where} by its plan, and there "
                f"are {size_text(there)}; {_advice(recipe, plan, placement)}; --force goes on all the same"
            )
        size, phase = _most(held, place, per_machine)
        # Of the host beside a GPU, pages of files are counted that the system takes back.
        if size > there and place.replace("process", "host") == plan.shape.computes_on:
            up_to = f"{subject} up to {size_text(size)} on {where} by its plan, and there are {size_text(there)}"
            logger.warning("memory: in the phase %s %s; losa plan shows what takes it", phase, up_to)


def _most(held: list[Holding], place: str, per_machine: int) -> tuple[int, str]:
    """Most bytes at a time, and the phase."""
    sums = machine_sums(held, per_machine) if place == "host" else phase_sums(held, place.replace("process", "host"))
    phase = max(sums, key=sums.__getitem__, default="throughout")
    return sums.get(phase, 0), phase


def _advice(recipe: Recipe, plan: Planned, placement: Placement) -> str:
    offloaded = recipe.model_copy(update={"offload": "disk"})
    if placement.processes > 1 and plan.shape.on_gpu:
        return f"`losa plan RECIPE --gpus {placement.processes}` names settings that need less"
    with suppress(LosaError):
        if recipe.offload is None and list(recipe.methods) == ["prune_only"] and recipe.gguf_file is None:
            check_offload(offloaded)
            return "offload: disk (--offload disk) holds one block of the model at a time"
    return "the table says what takes it"
