"""What a recipe holds in memory, phase by phase, where one decoder block at a time is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from losa.algorithm.schedule import Round
from losa.evaluation.perplexity import HIDDEN_BYTES
from losa.recipe.methods import MethodName
from losa.recipe.sections import Recipe
from losa.run.estimate_memory import Trained, evaluation_work, pruning_work
from losa.run.estimate_sharded import block_parts, whole_bytes
from losa.run.holding import Holding, block_phases, in_phases
from losa.run.model_shape import ModelShape


def offloaded_holdings(
    recipe: Recipe, shape: ModelShape, rounds: dict[MethodName, list[Round]], capacity: dict[str, int]
) -> list[Holding]:
    """Everything that losa itself holds. Arguments: ``losa.run.estimate_memory.holdings``."""
    place = shape.computes_on
    outside, block = whole_bytes(shape.outside), max(map(whole_bytes, block_parts(shape, Trained(0))))
    how = "embeddings, last norm and output layer"
    held = [Holding("throughout", place, "outside of the blocks", outside, how)]
    held += _of_block(place, block_phases(recipe), block)
    held += pruning_work(recipe, shape, list(rounds), capacity.get("device", 0) - outside - block, 1)
    if recipe.evaluate is not None:
        held += _of_block(place, ["evaluation"], block)
        held += evaluation_work(recipe.evaluate, shape)
        size, how = HIDDEN_BYTES, "of as many windows as there may be at a time, at most"
        if recipe.evaluate.max_windows is not None:
            windows = recipe.evaluate.max_windows * recipe.evaluate.length * shape.hidden * shape.dtype.itemsize
            size = min(size, windows)
        # The text may have fewer windows.
        held.append(Holding("evaluation", "host", "hidden states of windows", size, how, certain=False))
    held += _of_block(place, ["export"], block)
    return held


def _of_block(place: str, phases: Sequence[str], size: int) -> Iterator[Holding]:
    yield from in_phases(phases, Holding("", place, "one block", size, "weights and masks of the largest block"))
    if place == "device":
        how = "before it moves, or while it is written"
        yield from in_phases(phases, Holding("", "host", "one block, as it is read", size, how))
