"""A run that needs more memory than there is, told before it has loaded anything."""

from __future__ import annotations

from rich.console import Console

from losa.distributed.processes import process_count
from losa.errors import LosaError
from losa.output.tables import show_table
from losa.recipe.sections import Recipe
from losa.run.estimate import Estimate, estimate
from losa.run.estimate_memory import PHASES
from losa.run.estimate_tables import memory_table, size_text
from losa.run.planned import phase_sums

# While a model moves to a GPU its weights are pages of files, which the system takes back when it needs memory.
_LOADING = PHASES[1]


def check_memory(recipe: Recipe, console: Console) -> None:
    """Look at the run's plan, and show it where the run does not fit. Runs of several processes choose their placement
    by their plan instead (``losa.run.choice``).

    Raises:
        LosaError: what losa holds by its plan is more than the memory of the machine, or of its GPU.
    """
    if process_count() > 1:
        return
    try:
        plan = estimate(recipe, probe=False)
    except LosaError:  # of the recipe or the model: the run says it too, where it meets it
        return
    for place, there in plan.capacity.items():
        size, phase = _peak(plan, place)
        if size > there:
            show_table(memory_table(plan), console)
            where = "the host" if place == "host" else plan.device
            raise LosaError(
                f"memory: in the phase {phase} the run holds {size_text(size)} on {where} by its plan, and there are "
                f"{size_text(there)}; {_advice(recipe)}; --force goes on all the same"
            )


def _peak(plan: Estimate, place: str) -> tuple[int, str]:
    sums = phase_sums(plan.holdings, place)
    sums.pop(_LOADING, None)
    return max((size, phase) for phase, size in sums.items())


def _advice(recipe: Recipe) -> str:
    if list(recipe.methods) == ["prune_only"] and recipe.offload is None:
        return "offload: disk (--offload disk) holds one block of the model at a time"
    return "the table says what takes it"
