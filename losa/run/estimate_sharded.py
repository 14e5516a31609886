"""What a recipe holds in memory, phase by phase, where processes hold one model together.

Every figure is of the process that holds most: the first one of those that share a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from losa.algorithm.schedule import Round
from losa.pruners import LinearShape, get_pruner
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.sections import Recipe
from losa.run.estimate_memory import (
    Trained,
    dense_weights,
    evaluation_work,
    keeps_for_stream,
    largest_pruned,
    pruning_work,
    reconstruction_work,
    replaces_weights,
    stack_bytes,
    training_work,
)
from losa.run.holding import Holding, block_phases, in_phases
from losa.run.model_shape import ModelShape, Rows
from losa.run.placement import Placement


def own_bytes(parameters: Iterable[Rows], shard_size: int, pinned: bool = False) -> int:
    """Of the rows of one process: ``torch.chunk`` gives the first process as many as any other. ``pinned``: in
    page-locked memory, of which torch takes a power of two for each tensor."""
    sizes = (-(-rows.count // shard_size) * rows.size for rows in parameters)
    return sum(1 << (size - 1).bit_length() if pinned and size else size for size in sizes)


def whole_bytes(parameters: Iterable[Rows]) -> int:
    return own_bytes(parameters, 1)


def sent_bytes(parameters: Iterable[Rows], shard_size: int) -> int:
    """Of parameters on their way: every process sends as many rows as the first one has."""
    return shard_size * own_bytes(parameters, shard_size)


def weights_of(shape: ModelShape) -> list[Rows]:
    """Of the linears that are pruned."""
    return [Rows(w.outputs, w.inputs * shape.dtype.itemsize) for w in shape.pruned]


def masks_of(linears: Iterable[LinearShape]) -> list[Rows]:
    return [Rows(w.outputs, -(-w.inputs // 8)) for w in linears]


def block_parts(shape: ModelShape, trained: Trained) -> list[list[Rows]]:
    """All parameters of each block of a wrapped model: weights, masks and adapters."""
    return [
        [*inside, *masks_of(pruned), *trained.rows(pruned)]
        for inside, pruned in zip(shape.inside, shape.by_block, strict=True)
    ]


def sharded_holdings(
    recipe: Recipe,
    shape: ModelShape,
    rounds: dict[MethodName, list[Round]],
    capacity: dict[str, int],
    placement: Placement,
) -> list[Holding]:
    """Everything that losa itself holds. Arguments: ``losa.run.estimate_memory.holdings``."""
    trained = Trained.most(rounds)
    size, (place, pinned, share) = placement.shard_size or 1, _waiting(shape, placement)
    held = list(_own_rows(shape, trained, placement))
    pruned = weights_of(shape)
    dense = dense_weights(recipe, list(rounds), place, own_bytes(pruned, size, pinned), own_bytes(pruned, size))
    held += (replace(each, how=f"{each.how}; {share}") for each in dense)
    replaced = own_bytes((rows for form in shape.replaced for rows in form), size)
    # Of a pruner that gives new weights, what the next method begins from is among the dense weights, unless a teacher
    # or the dense stream keeps the linears' own beside it.
    apart = not get_pruner(recipe.prune).updates_weight or keeps_for_stream(recipe, rounds)
    if len(rounds) > 1 and replaced and (apart or any(map(recipe.distills, rounds))):
        how = f"as they were, from which the next method begins; {share}"
        held += in_phases((*block_phases(recipe), "training"), Holding("", place, _OTHER_FORMS, replaced, how))
    free = capacity.get("device", 0) - sum(h.size for h in held if h.place == "device" and h.phase == "throughout")
    held += _blocks_in_pruning(recipe, shape, trained)
    held += pruning_work(recipe, shape, list(rounds), free, placement.processes)
    held += reconstruction_work(recipe, shape, rounds)
    if recipe.train is not None and any(METHODS[name].trains for name in rounds):
        held += _training(recipe, shape, trained, placement)
        held += training_work(recipe.train, shape)
    if recipe.evaluate is not None:
        held += _evaluation(shape, trained, placement)
        held += evaluation_work(recipe.evaluate, shape)
    return [*held, *_export(shape, placement)]


def _own_rows(shape: ModelShape, trained: Trained, placement: Placement) -> Iterator[Holding]:
    size, (place, pinned, share) = placement.shard_size or 1, _waiting(shape, placement)
    weights = [rows for part in (shape.outside, *shape.inside) for rows in part]
    masks, adapters = masks_of(shape.pruned), trained.rows(shape.pruned)
    how = f"parameters x {shape.dtype.itemsize} bytes, {share}"
    yield Holding("throughout", place, "weights", own_bytes(weights, size, pinned), how)
    yield Holding("throughout", place, "masks", own_bytes(masks, size, pinned), f"1 bit a weight; {share}")
    yield Holding("throughout", place, "adapters", own_bytes(adapters, size, pinned), f"{trained.how}; {share}")
    stored = [rows for part in (shape.outside, *shape.stored) for rows in part]
    more = own_bytes(stored, size) - own_bytes(weights, size)
    for phase in ("loading", "evaluation", "export") if more > 0 else ():
        how = "as they are stored, beyond what their linears have; a stack has a row for each expert"
        yield Holding(phase, place, _OTHER_FORMS, more, how)
    if shape.replaced:
        # Wrapping comes after loading and before pruning.
        form = max(shape.replaced, key=whole_bytes)
        held, how = sent_bytes(form, size) + 2 * whole_bytes(form), "the largest, as linears take its place"
        yield Holding("loading", shape.computes_on, "one stack, on its way, whole, and its linears", held, how)
    if shape.on_gpu:
        largest = max(own_bytes([rows], size) for rows in stored)
        yield Holding("loading", "host", "rows of one tensor", largest, "read before they move; the largest tensor")


def _waiting(shape: ModelShape, placement: Placement) -> tuple[Literal["device", "host"], bool, str]:
    """Where a process's rows are, whether they are pinned there, and how they are counted."""
    size, pinned = placement.shard_size or 1, placement.offload and shape.on_gpu
    share = (f"1/{size} of the rows" if size > 1 else "all rows") + ", pinned: powers of two" * pinned
    return "host" if placement.offload else shape.computes_on, pinned, share


def _blocks_in_pruning(recipe: Recipe, shape: ModelShape, trained: Trained) -> Iterator[Holding]:
    place = shape.computes_on
    how = "weights, masks and adapters of the largest block"
    size = max(map(whole_bytes, block_parts(shape, trained)))
    yield from in_phases(block_phases(recipe), Holding("", place, "one block, whole", size, how))
    if get_pruner(recipe.prune).updates_weight:
        how = "whole as well, next to the present ones"
        new = Holding("", place, "new weights of a block", largest_pruned(shape), how)
        yield from in_phases(block_phases(recipe), new)


def _training(recipe: Recipe, shape: ModelShape, trained: Trained, placement: Placement) -> Iterator[Holding]:
    size, (place, pinned, _) = placement.shard_size or 1, _waiting(shape, placement)
    adapters = trained.rows(shape.pruned)
    own = own_bytes(adapters, size)
    yield Holding("training", place, "gradients", own_bytes(adapters, size, pinned), "as the adapters")
    yield Holding("training", place, "optimiser", 2 * own, "AdamW: two fp32 moments a parameter")
    blocks = sorted(block_parts(shape, trained), key=whole_bytes, reverse=True)
    kept, how = whole_bytes(blocks[0]), "the one that runs"
    if not recipe.distributed.reshard_after_forward:
        kept, how = sum(map(whole_bytes, blocks)), "reshard_after_forward: false keeps all until the backward pass"
    yield Holding("training", shape.computes_on, "blocks, whole", kept, how)
    yield from _laid_together("training", shape)
    if size > 1:
        on_the_way = sum(sent_bytes(block, size) for block in blocks[:2])
        how = "the one that runs and the next one, as they come from the processes"
        yield Holding("training", shape.computes_on, "blocks on their way", on_the_way, how)
    if any(map(recipe.distills, recipe.methods)) and replaces_weights(recipe, list(recipe.methods)):
        how = "whole as well, while the teacher runs it"
        yield Holding("training", shape.computes_on, "dense weights of a block", largest_pruned(shape), how)
    each = [trained.rows(pruned) for pruned in shape.by_block]
    widest = max(whole_bytes(block) + sent_bytes(block, size) for block in each)
    how = "of whole adapters, and on their way: two blocks"
    yield Holding("training", shape.computes_on, "gradients of blocks", 2 * widest, how)
    if recipe.train is not None and recipe.train.gradient_accumulation > 1:
        every = whole_bytes(trained.rows(shape.pruned))
        how = "of all whole adapters, until a step's last pass"
        yield Holding("training", shape.computes_on, "gradients, summed", every, how)
    if recipe.checkpoint.asynchronous:
        yield Holding("training", "host", "state to be written", 3 * own, "adapters and moments: a copy of own rows")
    yield Holding("training", shape.computes_on, "outside of the blocks", whole_bytes(shape.outside), _OUTSIDE)


def _evaluation(shape: ModelShape, trained: Trained, placement: Placement) -> Iterator[Holding]:
    place = shape.computes_on
    wrapped = block_parts(shape, trained)
    yield Holding("evaluation", place, "one block, whole", max(map(whole_bytes, wrapped)), "the one that runs")
    # Before the first method, and of a merged model, experts are in their stacks.
    sent = max(sent_bytes(block, placement.shard_size or 1) for block in (*wrapped, *shape.stored))
    yield Holding("evaluation", place, "one block on its way", sent, "as it comes, before its rows are put together")
    yield Holding("evaluation", place, "outside of the blocks", whole_bytes(shape.outside), _OUTSIDE)
    yield from _laid_together("evaluation", shape)


def _laid_together(phase: str, shape: ModelShape) -> Iterator[Holding]:
    """Experts of a block that was gathered have memory of their own each, and a grouped product copies them."""
    if stack := stack_bytes(shape, shape.dtype):
        how = "of all experts that a call multiplies, laid together"
        yield Holding(phase, shape.computes_on, "experts' weights", stack, how, certain=False)


def _export(shape: ModelShape, placement: Placement) -> Iterator[Holding]:
    place, outside = shape.computes_on, whole_bytes(shape.outside)
    each = ((whole_bytes(block), sent_bytes(block, placement.shard_size or 1)) for block in shape.stored)
    size = max(whole + max(whole, sent) for whole, sent in each)
    how = "in memory, and as written, to compare them; or as it comes"
    yield Holding("export", place, "one block, twice", size, how)
    how = "embeddings, last norm and output layer, in memory and as written"
    yield Holding("export", place, "outside of the blocks, twice", 2 * outside, how)


_OTHER_FORMS = "stacks and transposed linears"
_OUTSIDE = "embeddings, last norm and output layer, whole throughout a pass"
