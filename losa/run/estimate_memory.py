"""What a recipe holds in memory, phase by phase, where every process has the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from losa.algorithm.engine import keeps_originals
from losa.algorithm.gradients import stay_on_device, wanted_gradients
from losa.algorithm.schedule import Round
from losa.algorithm.stream import COMPARED_TOKENS
from losa.algorithm.stream_storage import fits_on_device
from losa.pruners import LinearShape, PruningShape, get_pruner
from losa.pruners.cost import in_several_passes
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.rates import RATES, takes_backward, tries_widths
from losa.recipe.sections import EvaluateConfig, Recipe
from losa.recipe.training import TrainConfig
from losa.run.holding import BLOCK_PHASES, Holding, block_phases, in_phases
from losa.run.model_shape import ModelShape, Rows
from losa.training.loss import chunk_rows
from losa_kernels.grouped_masked_lora.groups import STACK_BYTES, may_multiply_together


@dataclass(frozen=True)
class Trained:
    """What is trained of every pruned linear, in fp32: A (rank, in) and B (out, rank), or a change of each weight where
    ``rank`` is None. Rank 0: nothing."""

    rank: int | None

    @classmethod
    def most(cls, rounds: dict[MethodName, list[Round]]) -> Trained:
        """Of the method that trains most. ``rounds``: of every method."""
        own = {name: each for name, each in rounds.items() if METHODS[name].trains}
        return cls(None if any(METHODS[name].adapter == "weights" for name in own) else highest_rank(own))

    def rows(self, linears: Iterable[LinearShape]) -> list[Rows]:
        """The parameters as they are sharded."""
        if self.rank is None:
            return [Rows(w.outputs, 4 * w.inputs) for w in linears]
        return [rows for w in linears for rows in (Rows(self.rank, 4 * w.inputs), Rows(w.outputs, 4 * self.rank))]

    def size(self, linears: Iterable[LinearShape]) -> int:
        """Bytes."""
        return sum(rows.count * rows.size for rows in self.rows(linears))

    @property
    def how(self) -> str:
        """How they are counted."""
        if self.rank is None:
            return "a change of every weight, 4 bytes each"
        return f"rank (in + out) x 4 bytes, mean rank {self.rank}"


def holdings(
    recipe: Recipe,
    shape: ModelShape,
    rounds: dict[MethodName, list[Round]],
    capacity: dict[str, int],
    processes: int = 1,
) -> list[Holding]:
    """Everything that losa itself holds in the process that holds most.

    Args:
        rounds: of every method.
        capacity: bytes of memory by place, where known.
    """
    trained = Trained.most(rounds)
    pruned = shape.dtype.itemsize * shape.prunable
    held = [*_throughout(shape, trained), *dense_weights(recipe, list(rounds), shape.computes_on, pruned, pruned)]
    # What is free on the device when the streams begin, as far as it is known.
    free = capacity.get("device", 0) - sum(h.size for h in held if h.place == "device" and h.phase == "throughout")
    held += pruning_work(recipe, shape, list(rounds), free, processes)
    held += reconstruction_work(recipe, shape, rounds)
    if recipe.train is not None and any(METHODS[name].trains for name in rounds):
        held += _training(shape, trained, processes)
        held += training_work(recipe.train, shape)
    if recipe.evaluate is not None:
        held += evaluation_work(recipe.evaluate, shape)
    # The written model is compared by pages of its files, which the system takes back. What transformers makes of
    # several stored tensors has memory of its own.
    if shape.replaced:
        size = sum(rows.count * rows.size for form in shape.replaced for rows in form)
        how = "where the files hold each expert by itself"
        held.append(Holding("export", "host", "stacks, read back", size, how, main_only=True, certain=False))
    return held


def highest_rank(rounds: dict[MethodName, list[Round]]) -> int:
    return max((each.mean_rank for own in rounds.values() for each in own), default=0)


def pruning_shape(recipe: Recipe, shape: ModelShape) -> PruningShape:
    tokens = recipe.calibration.samples * recipe.calibration.length
    # Rates of linears need the statistics of all linears of a block at once.
    alike = all(recipe.allocation_of(name).per == "block" for name in recipe.methods)
    held = recipe.calibration.statistics_gb * 1e9 if alike else math.inf
    return PruningShape(shape.pruned, shape.blocks, tokens, on_gpu=shape.on_gpu, statistics=held)


def largest_share(count: int, unit: int, processes: int) -> int:
    """Most of ``count`` items that one process gets when they are dealt out in whole units
    (``losa.distributed.collectives.share_of``)."""
    units = -(-count // unit)
    return min(count, -(-units // processes) * unit)


def largest_pruned(shape: ModelShape) -> int:
    """Bytes of the weights that are pruned of one block, the largest."""
    return shape.dtype.itemsize * max(sum(w.numel for w in pruned) for pruned in shape.by_block)


def _throughout(shape: ModelShape, trained: Trained) -> Iterator[Holding]:
    place, size = shape.computes_on, shape.dtype.itemsize
    yield Holding("throughout", place, "weights", shape.weight_bytes, f"parameters x {size} bytes")
    yield Holding("throughout", place, "masks", _mask_bytes(shape), "1 bit a weight")
    if trained.rank != 0:
        yield Holding("throughout", place, "adapters", trained.size(shape.pruned), trained.how)
    if shape.on_gpu:
        how = f"parameters x {size} bytes"
        yield Holding("loading", "host", "weights, before they move", shape.weight_bytes, how, certain=False)


def _mask_bytes(shape: ModelShape) -> int:
    return sum(w.outputs * -(-w.inputs // 8) for w in shape.pruned)


def dense_weights(recipe: Recipe, names: list[MethodName], place: str, size: int, moved: int) -> Iterator[Holding]:
    """Weights as they were, where something later needs them besides what pruning or merging makes of them.

    Args:
        names: of all methods.
        place: of the weights that are present.
        size: bytes of the linears' weights in that place.
        moved: the same in host memory, to which they move from a device.
    """
    pruner = get_pruner(recipe.prune)
    if len(names) > 1:
        phase, others = ("throughout", "new") if pruner.updates_weight else ("evaluation", "merged")
        yield Holding(phase, place, "dense weights", size, f"beside {others} ones: the next method begins from them")
    kept = keeps_for_stream(recipe, names)
    if any(map(recipe.distills, names)) and replaces_weights(recipe, names):
        # The teacher: what the next method begins from serves both.
        if len(names) == 1 or not pruner.updates_weight:
            phases = (*block_phases(recipe), "training", *(["evaluation"] if len(names) == 1 else []))
            yield from in_phases(phases, Holding("", place, "dense weights", size, "as they were, for the teacher"))
    elif kept and (len(names) == 1 or place == "device"):
        how = "as they were, for the dense stream of later rounds"
        held = Holding("", "host", "dense weights", moved if place == "device" else size, how)
        yield from in_phases((*block_phases(recipe), "training", "evaluation"), held)


def keeps_for_stream(recipe: Recipe, names: Iterable[MethodName]) -> bool:
    """Whether weights stay as they were beside new ones, for the dense stream of some method's later rounds."""
    pruner = get_pruner(recipe.prune)
    return any(keeps_originals(recipe.prune, pruner, recipe.streams_dense(name)) for name in names)


def replaces_weights(recipe: Recipe, names: list[MethodName]) -> bool:
    """Whether a method that trains has other weights then than the dense model: its pruner gives new ones, or its dense
    adapters stand beside weights with zeros."""
    updates = get_pruner(recipe.prune).updates_weight
    training = [METHODS[name] for name in names if METHODS[name].training == "rounds"]
    return any(updates or method.zeros_in_weights for method in training)


def pruning_work(
    recipe: Recipe, shape: ModelShape, names: list[MethodName], free: int, processes: int
) -> Iterator[Holding]:
    """What calibration and pruning take next to the model.

    Args:
        names: of all methods.
        free: bytes of the device that nothing else takes.
    """
    calibration, place, size = recipe.calibration, shape.computes_on, shape.dtype.itemsize
    for holding in _gradients(recipe, shape, free):
        yield holding
        stays = holding.phase == "pruning" and holding.place == "device"
        free -= holding.size * stays
    # Hidden states of all samples wait between two blocks, on the device if they fit there.
    streams = 2 if any(map(recipe.streams_dense, names)) else 1
    samples = largest_share(calibration.samples, calibration.batch_size, processes)
    hidden = samples * calibration.length * shape.hidden * size
    how = "samples x length x hidden" + (", the dense and the sparse stream" if streams == 2 else "")
    if processes > 1:
        how += f"; {samples} of {calibration.samples} samples"
    waits = "device" if shape.on_gpu and fits_on_device(hidden, free - (streams - 1) * hidden) else "host"
    # Pinned memory comes in powers of two.
    held = 1 << (hidden - 1).bit_length() if shape.on_gpu and waits == "host" else hidden
    yield from in_phases(block_phases(recipe), Holding("", waits, "hidden states", streams * held, how))
    if recipe.any_rated:
        yield from _for_rates(recipe, shape)
    batch = min(calibration.batch_size, calibration.samples) * calibration.length
    widest = max(max(w.inputs, w.outputs) for w in shape.linears)
    how = "3 x batch x length x widest side"
    yield Holding("calibration", place, "one batch in a block", 3 * batch * widest * size, how)
    pruned = pruning_shape(recipe, shape)
    costs = get_pruner(recipe.prune).memory(pruned)
    # The block as it was is kept for the next pass over it.
    passes = 1 + (any(cost.collected for cost in costs) and in_several_passes(pruned))
    how = "M * (W + s B A), formed once for all batches"
    for phase in BLOCK_PHASES[:passes]:
        # Inputs that linears share may leave one pass alone.
        certain = phase == "calibration"
        yield Holding(phase, place, "merged weights of a block", largest_pruned(shape), how, certain=certain)
    for cost in costs:
        each = Holding("pruning", place, cost.what, int(cost.size), cost.how, certain=cost.certain)
        yield from in_phases(BLOCK_PHASES[not cost.collected : 2], each)
    if recipe.any_rated and recipe.allocation.per == "row":
        size, how = 3 * 4 * max(w.numel for w in shape.pruned), "3 fp32 copies of the largest linear"
        yield Holding("pruning", place, "comparing the rows of a linear", size, how)


def _for_rates(recipe: Recipe, shape: ModelShape) -> Iterator[Holding]:
    calibration, place = recipe.calibration, shape.computes_on
    compared = min(calibration.cka_samples, calibration.samples)
    match RATES[recipe.allocation.rates].needs:
        case "similarity":
            size, how = 4 * shape.blocks * compared**2, "blocks x samples^2 x 4 bytes"
            yield Holding("calibration", place, "Grams", size, how)
        case "normalised similarity":
            size, how = 4 * shape.blocks * COMPARED_TOKENS**2, "blocks x tokens^2 x 4 bytes"
            yield Holding("calibration", place, "Grams", size, how)
        case "scores":
            widest = max(sum(w.numel for w in pruned) for pruned in shape.by_block)
            yield Holding("calibration", place, "scores of a block", 2 * 4 * widest, "2 x 4 bytes a weight")
        case "losses":
            yield Holding(
                "calibration", place, "squares of a linear", 2 * 4 * shape.widest, "2 x 4 bytes of the largest"
            )
    if tries_widths(recipe.allocation.rates, recipe.allocation.delta):
        tokens = min(calibration.batch_size, compared) * calibration.length
        how = f"{_logits_of(shape)}, hidden states, to try rates"
        yield Holding("calibration", place, "loss", loss_bytes(shape, tokens, "evaluation"), how)
        size, how = _mask_bytes(shape), "1 bit a weight, beside the masks so far"
        if any(METHODS[name].zeros_in_weights and recipe.rated(name) for name in recipe.methods):
            size, how = size + shape.dtype.itemsize * shape.prunable, f"{how}, and the weights with their zeros"
        yield Holding("calibration", place, "masks to try rates", size, how)


def reconstruction_work(recipe: Recipe, shape: ModelShape, rounds: dict[MethodName, list[Round]]) -> Iterator[Holding]:
    """What the reconstruction of a block takes next to calibration and pruning."""
    config, calibration = recipe.reconstruct, recipe.calibration
    if config is None:
        return
    size, rank = shape.dtype.itemsize, highest_rank(rounds)
    tokens = min(config.batch_size, calibration.batch_size, calibration.samples) * calibration.length
    sides = sum(w.inputs + w.outputs for w in shape.linears) / shape.blocks
    activations = tokens * (sides * size + 2 * 4 * shape.hidden)
    adapters = max(sum(rank * (w.inputs + w.outputs) for w in pruned) for pruned in shape.by_block)
    # The adapters as they were; gradients twice, when they are summed; two moments. Of the largest linear M (W + s B A)
    # and dY^T x.
    states = 5 * 4 * adapters + 2 * 4 * shape.widest
    how = "tokens x (in + out) of its linears, gradients, moments and a copy of its adapters, one linear's product"
    size = int(activations + states)
    yield Holding("reconstruction", shape.computes_on, "reconstruction of a block", size, how)


def _gradients(recipe: Recipe, shape: ModelShape, free: int) -> Iterator[Holding]:
    """What passes for gradients take, and their statistics. They come before the streams that prune."""
    wanted = wanted_gradients(recipe.prune, get_pruner(recipe.prune))
    for_rates = recipe.any_rated and takes_backward(recipe.allocation.rates)
    if not wanted and not for_rates:
        return
    if wanted:
        size = 4 * len(wanted) * shape.prunable
        waits = "device" if shape.on_gpu and stay_on_device(size, free) else "host"
        held = Holding("", waits, "statistics of gradients", size, f"{len(wanted)} x 4 bytes a weight")
        yield from in_phases(("gradients", *block_phases(recipe)), held)
    place, length = shape.computes_on, recipe.calibration.length
    sides = sum(w.inputs + w.outputs for w in shape.linears)
    how = "length x (in + out) of every linear, of one sample"
    yield Holding("gradients", place, "activations for gradients", length * sides * shape.dtype.itemsize, how)
    how = f"{_logits_of(shape)}; the last hidden states and their gradient"
    loss = loss_bytes(shape, length, "training")
    if for_rates:  # labels are drawn before the pass that needs them
        loss = max(loss, loss_bytes(shape, length, "labels"))
    yield Holding("gradients", place, "loss for gradients", loss, how)


def _training(shape: ModelShape, trained: Trained, processes: int) -> Iterator[Holding]:
    place, adapters = shape.computes_on, trained.size(shape.pruned)
    yield Holding("training", place, "gradients", adapters, "as the adapters")
    if processes > 1:
        yield Holding("training", place, "buckets", adapters, "gradients on their way, as the adapters")
    yield Holding("training", place, "optimiser", 2 * adapters, "AdamW: two fp32 moments a parameter")


def training_work(train: TrainConfig, shape: ModelShape) -> Iterator[Holding]:
    """What a forward and backward pass takes next to the model and its states."""
    place, size = shape.computes_on, shape.computed.itemsize
    tokens = train.batch_size * train.length
    # What the backward pass needs of the forward pass.
    sides = sum(w.inputs + w.outputs for w in shape.linears)
    kept: float = sides
    how = "tokens x (in + out) of every linear: x once, and as much as y for the rest of a block"
    if train.activation_checkpointing:
        kept = shape.blocks * shape.hidden + sides / shape.blocks
        how = "tokens x (hidden a block + one whole block)"
    yield Holding("training", place, "activations", int(tokens * kept * size), how)
    how = f"{_logits_of(shape)}; the last hidden states and their gradient"
    held = loss_bytes(shape, tokens, "training", shape.computed)
    if train.distill is not None:
        part = "all" if shape.whole_logits else "half a chunk"
        how = f"logits and softmaxes of {part} of both models, the gradient; hidden states of both"
        # Of each block the teacher's output, the model's, and their difference.
        compared = 3 * shape.blocks if train.distill.hidden else 0
        held = loss_bytes(shape, tokens, "distillation", shape.computed) + (1 + compared) * tokens * shape.hidden * size
    yield Holding("training", place, "loss", held, how)
    how = "M (W + s B A) and dY^T x of the largest"
    yield Holding("training", place, "one linear's product", 2 * 4 * shape.widest, how)
    if not shape.drops and (stack := stack_bytes(shape, shape.computed)):
        how = "the same of all experts that a call multiplies"
        yield Holding("training", place, "experts' products", 2 * stack, how, certain=False)


def stack_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Of M (W + s B A) of the experts that a GPU multiplies together; 0 where it does not. An expert's rank may be too
    large for it."""
    expert = shape.of_expert
    several = shape.together > expert.numel
    together = several and may_multiply_together(dtype, 1, (expert.outputs, expert.inputs))
    return min(dtype.itemsize * shape.together, STACK_BYTES) if shape.on_gpu and together else 0


def evaluation_work(evaluate: EvaluateConfig, shape: ModelShape) -> Iterator[Holding]:
    """What a forward pass without gradients takes next to the model."""
    place, tokens = shape.computes_on, evaluate.batch_size * evaluate.length
    widest = max(max(w.inputs, w.outputs) for w in shape.linears)
    how = "3 x batch x length x widest side"
    yield Holding("evaluation", place, "one batch in a block", 3 * tokens * widest * shape.dtype.itemsize, how)
    how = f"{_logits_of(shape)}, hidden states"
    yield Holding("evaluation", place, "loss", loss_bytes(shape, tokens, "evaluation"), how)
    if stack := stack_bytes(shape, shape.dtype):
        how = "M (W + s B A) of all experts that a call multiplies"
        yield Holding("evaluation", place, "experts' products", stack, how, certain=False)


# What is held of each logit at a time: numbers in the type that the pass computes in; fp32 numbers beside them; and
# fp32 copies of the former, where that type is narrower. In chunks the gradient is made along with the loss, in the
# logits' own memory. Where all logits are there at once, soft-capping and autograd keep more of them.
_CHUNKED = {"evaluation": (1, 0, 1), "training": (1, 0, 1), "distillation": (1, 4, 1), "labels": (1, 2, 0)}
_WHOLE = {"evaluation": (1, 1, 1), "training": (2, 3, 0), "distillation": (3, 7, 2), "labels": (1, 2, 0)}


def loss_bytes(
    shape: ModelShape,
    tokens: int,
    of: Literal["evaluation", "training", "distillation", "labels"],
    dtype: torch.dtype | None = None,
) -> int:
    """Logits, softmaxes, gradients, and hidden states of a loss, and the output layer in the type that it computes in.

    Args:
        of: the kind of pass; "labels" are drawn from the model's distribution.
        dtype: that it computes in; None: the model's.
    """
    dtype = dtype or shape.dtype
    size = dtype.itemsize
    own, wide, copies = (_WHOLE if shape.whole_logits else _CHUNKED)[of]
    share = 0.5 if of == "distillation" else 1
    chunk = max(1, int(share * chunk_rows(shape.device.type, shape.vocabulary)))
    rows = tokens if shape.whole_logits else min(tokens, chunk)
    held = rows * shape.vocabulary * (size * own + 4 * (wide + copies * (size < 4))) + 2 * tokens * shape.hidden * size
    return held + (shape.work.head * size if dtype != shape.dtype else 0)


def _logits_of(shape: ModelShape) -> str:
    return "all logits" if shape.whole_logits else "a chunk of logits"
