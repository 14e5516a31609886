"""A run that needs more memory than there is, told before it has loaded anything."""

from __future__ import annotations

import logging
from contextlib import suppress

from rich.console import Console

from losa.distributed.processes import process_count
from losa.errors import LosaError
from losa.model.loading import torch_device
from losa.output.tables import show_table
from losa.recipe.sections import Recipe
from losa.run.estimate import estimate
from losa.run.estimate_tables import memory_table, size_text
from losa.run.offloaded import check_offload

logger = logging.getLogger("losa")


def check_memory(recipe: Recipe, console: Console) -> None:
    """Look at the run's plan, and show it where the run does not fit: what it is certain to hold is more than there is.
    Runs of several processes choose their placement by their plan instead (``losa.run.choice``).

    Raises:
        ModelError: no such device.
        LosaError: the plan asks for more than the memory of the machine, or of its GPU.
    """
    if process_count() > 1:
        return
    torch_device(recipe.device)
    try:
        plan = estimate(recipe, probe=False)
    except Exception as error:  # of the recipe or the model: the run says it too, where it meets it
        logger.debug("the run has no plan: %s", error)
        return
    for place, there in plan.capacity.items():
        size, phase = plan.peak(place, certain=True)
        if size > there:
            show_table(memory_table(plan), console)
            where = "the host" if place == "host" else plan.device
            raise LosaError(
                f"memory: in the phase {phase} the run holds at least {size_text(size)} on {where} by its plan, and "
                f"there are {size_text(there)}; {_advice(recipe)}; --force goes on all the same"
            )


def _advice(recipe: Recipe) -> str:
    offloaded = recipe.model_copy(update={"offload": "disk"})
    with suppress(LosaError):
        if recipe.offload is None and list(recipe.methods) == ["prune_only"] and recipe.gguf_file is None:
            check_offload(offloaded)
            return "offload: disk (--offload disk) holds one block of the model at a time"
    return "the table says what takes it"
