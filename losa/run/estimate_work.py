"""Matrix products that a recipe computes, stage by stage, in the process that computes most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from losa.algorithm.gradients import REGROWTH, wanted_gradients
from losa.algorithm.owners import deal
from losa.algorithm.schedule import Round
from losa.pruners import get_pruner
from losa.pruners.base import Pruner
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.rates import passes_for, selections_for, takes_backward
from losa.recipe.sections import EvaluateConfig, Recipe
from losa.recipe.training import TrainConfig
from losa.run.estimate_memory import largest_share, pruning_shape
from losa.run.model_shape import ModelShape


@dataclass(frozen=True)
class Stage:
    """``flops`` of matrix products. ``counted``: False for a rate per million tokens, where their number is open.
    ``method``: None for the dense model's. ``kind``: "pruning", "training" or "evaluation". ``times``: rounds,
    optimiser steps, or passes over the windows."""

    what: str
    flops: float
    counted: bool
    method: MethodName | None
    kind: str
    times: float


def stages(
    recipe: Recipe, shape: ModelShape, rounds: dict[MethodName, list[Round]], processes: int = 1
) -> Iterator[Stage]:
    """The dense evaluation, then every method's stages. ``rounds``: of every method."""
    evaluation = recipe.evaluate
    windows = None
    if evaluation is not None and evaluation.max_windows is not None:
        tokens = windows_of_one(evaluation, processes) * evaluation.length
        windows = tokens * (shape.work.forward(evaluation.length) + 2.0 * shape.work.head)
        yield Stage("dense: evaluation", windows, True, None, "evaluation", 1)
    for name, own in rounds.items():
        work = len(own) * _pruning(recipe, shape, name, processes)
        work += _gradients(recipe, shape, name, len(own), processes)
        if name == next(iter(rounds)):
            work += _checks(recipe, shape)
        yield Stage(f"{name}: calibration and pruning", work, True, name, "pruning", len(own))
        if METHODS[name].trains and recipe.train is not None:
            yield _training_stage(recipe.train, shape, name, own, processes)
        if evaluation is not None and windows is not None:
            # Of a method that cannot be merged the unmerged model is evaluated as well.
            times = 1 + (not METHODS[name].mergeable)
            times += len(own) if evaluation.each_round and len(own) > 1 else 0
            yield Stage(f"{name}: evaluation", times * windows, True, name, "evaluation", times)


def windows_of_one(evaluation: EvaluateConfig, processes: int) -> int:
    """Windows of the process that has most."""
    assert evaluation.max_windows is not None
    return largest_share(evaluation.max_windows, evaluation.batch_size, processes)


def _training_stage(
    train: TrainConfig, shape: ModelShape, name: MethodName, rounds: list[Round], processes: int
) -> Stage:
    per_token, one = _training(train, shape, name), train.batch_size * train.gradient_accumulation
    tokens = sum(each.sequences for each in rounds) * train.length
    if not tokens:
        steps = 1e6 / (one * processes * train.length)
        what = f"{name}: training, each million tokens"
        return Stage(what, 1e6 * per_token / processes, False, name, "training", steps)
    steps = sum(steps_of(train, each, processes) for each in rounds)
    if processes > 1:
        tokens = train.length * sum(_sequences_of_one(train, each.sequences, processes) for each in rounds)
    return Stage(f"{name}: training", tokens * per_token, True, name, "training", steps)


def steps_of(train: TrainConfig, this_round: Round, processes: int) -> int:
    """Optimiser steps of a round."""
    return -(-this_round.sequences // (train.batch_size * train.gradient_accumulation * processes))


def _sequences_of_one(train: TrainConfig, sequences: int, processes: int) -> int:
    """Of the process that has most in each step; a step is over when it is done (``losa.training.dealing``)."""
    one = train.batch_size * train.gradient_accumulation
    full, rest = divmod(sequences, one * processes)
    size = min(train.batch_size, -(-rest // processes))
    return full * one + (largest_share(rest, size, processes) if rest else 0)


def _pruning(recipe: Recipe, shape: ModelShape, name: MethodName, processes: int) -> float:
    """FLOP of one round's calibration and pruning."""
    calibration, pruner = recipe.calibration, get_pruner(recipe.prune)
    own, compared = (
        largest_share(count, calibration.batch_size, processes)
        for count in (calibration.samples, min(calibration.cka_samples, calibration.samples))
    )
    # The sparse stream, which is read once more for statistics; the dense stream; the samples that serve rates.
    rates = recipe.allocation.rates, recipe.allocation.delta
    of_inputs = pruner.statistic is not None and not wanted_gradients(recipe.prune, pruner).keys() - {REGROWTH}
    samples, predicted = own + (own if of_inputs else 0), 0
    samples += own if recipe.streams_dense(name) else 0
    if recipe.rated(name):
        samples += compared * passes_for(*rates)
        predicted = compared * selections_for(*rates)
    work = samples * calibration.length * shape.work.forward(calibration.length)
    if of_inputs and calibration.experts == "all":
        # Every expert sees every token in the pass for statistics.
        work += own * calibration.length * 2.0 * (sum(w.numel for w in shape.linears) - shape.work.linears)
    work += predicted * calibration.length * 2.0 * shape.work.head
    work += _reconstructing(recipe, shape, processes) if recipe.reconstructs(name) else 0
    return work + _solving(pruner, recipe, shape, own, processes)


def _reconstructing(recipe: Recipe, shape: ModelShape, processes: int) -> float:
    """FLOP of the steps on all blocks in one round, and of the loss after them. Samples are drawn at random, and all
    processes wait for the one with most of them: at least so many."""
    config, calibration = recipe.reconstruct, recipe.calibration
    assert config is not None
    tokens = -(-min(config.batch_size, calibration.samples) // processes) * calibration.length
    blocks = replace(shape.work, head=0, dropout=False)
    return tokens * (config.steps * blocks.training(calibration.length) + blocks.forward(calibration.length))


def _gradients(recipe: Recipe, shape: ModelShape, name: MethodName, rounds: int, processes: int) -> float:
    """FLOP of passes forward and backward in all rounds: for statistics of gradients, which take dY^T x of what is
    pruned; and once for rates, which do not, but draw labels first."""
    wanted, calibration = wanted_gradients(recipe.prune, get_pruner(recipe.prune)), recipe.calibration
    work, flops = replace(shape.work, dropout=False), 0.0
    if wanted:
        # Weights come back from round 2 on; a pruner wants gradients in every round.
        passes = rounds if wanted.keys() - {REGROWTH} else rounds - 1
        tokens = largest_share(calibration.samples, 1, processes) * calibration.length
        flops += passes * tokens * work.training(calibration.length)
    if recipe.rated(name) and takes_backward(recipe.allocation.rates):
        compared = largest_share(min(calibration.cka_samples, calibration.samples), 1, processes)
        labels = work.forward(calibration.length) + 2.0 * work.head
        flops += compared * calibration.length * (labels + replace(work, masked=0).training(calibration.length))
    return flops


def _checks(recipe: Recipe, shape: ModelShape) -> float:
    """FLOP of every process before the first stream: two samples alone, each whole and block by block, and a whole pass
    for each other size of a batch (``losa.algorithm.stream``)."""
    calibration = recipe.calibration
    samples = 2 * 2 + sum(other_batches(recipe))
    return samples * calibration.length * shape.work.forward(calibration.length)


def other_batches(recipe: Recipe) -> set[int]:
    """Sizes of the batches that blocks are called with by themselves, but for a sample alone."""
    calibration, counts = recipe.calibration, {recipe.calibration.samples}
    if recipe.any_rated and passes_for(recipe.allocation.rates, recipe.allocation.delta):
        counts.add(min(calibration.cka_samples, calibration.samples))
    full = {min(count, calibration.batch_size) for count in counts}
    if recipe.reconstruct is not None:
        full.add(min(calibration.samples, calibration.batch_size, recipe.reconstruct.batch_size))
    return (full | {count % calibration.batch_size for count in counts}) - {0, 1}


def _solving(pruner: Pruner, recipe: Recipe, shape: ModelShape, samples: int, processes: int) -> float:
    """FLOP of the pruner's own products: statistics of ``samples`` in every process, and what the busiest owner
    decides."""
    every = pruning_shape(recipe, shape)
    work = pruner.flops(every)
    if processes == 1:
        return work
    statistics = work - pruner.flops(replace(every, tokens=0))
    solving = 0.0
    for index, linears in enumerate(shape.by_block):
        # At most: linears that share their input have one owner, and one factor of its Hessian.
        owners = deal([[linear] for linear in linears], pruner, processes, index, shape.on_gpu)
        sums = dict.fromkeys(owners, 0.0)
        for owner, linear in zip(owners, linears, strict=True):
            sums[owner] += pruner.flops(replace(every, linears=[linear], blocks=1, tokens=0))
        solving += max(sums.values(), default=0.0)
    return statistics * samples / recipe.calibration.samples + solving


def _training(train: TrainConfig, shape: ModelShape, name: MethodName) -> float:
    """FLOP a token of forward and backward passes, recomputation among them."""
    work = {
        "masked": shape.work,
        "weights": replace(shape.work, dropout=False),  # there is no adapter's input to drop
    }.get(METHODS[name].adapter or "", replace(shape.work, masked=0))
    recomputed = work.forward(train.length, training=True) if train.activation_checkpointing else 0
    return work.training(train.length, train.distill is not None) + recomputed
