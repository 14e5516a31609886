"""Matrix products that a recipe computes, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from losa.algorithm.schedule import Round
from losa.model.flops import TokenWork
from losa.pruners import get_pruner
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.sections import Recipe, TrainConfig
from losa.run.estimate_memory import pruning_shape
from losa.run.model_shape import ModelShape


@dataclass(frozen=True)
class Stage:
    """``flops`` of matrix products. ``counted``: False for a rate per million tokens, where their number is open."""

    what: str
    flops: float
    counted: bool = True


def stages(recipe: Recipe, shape: ModelShape, rounds: dict[MethodName, list[Round]]) -> Iterator[Stage]:
    """The dense evaluation, then every method's stages. ``rounds``: of every method."""
    evaluation = recipe.evaluate
    windows = None
    if evaluation is not None and evaluation.max_windows is not None:
        tokens = evaluation.max_windows * evaluation.length
        windows = tokens * (_forward(shape, evaluation.length) + 2.0 * shape.head)
        yield Stage("dense: evaluation", windows)
    for name, own in rounds.items():
        yield Stage(f"{name}: calibration and pruning", len(own) * _pruning(recipe, shape, name))
        if METHODS[name].trains and recipe.train is not None:
            per_token = _training(recipe.train, shape)
            tokens = sum(each.sequences for each in own) * recipe.train.length
            if tokens:
                yield Stage(f"{name}: training", tokens * per_token)
            else:
                yield Stage(f"{name}: training, each million tokens", 1e6 * per_token, counted=False)
        if evaluation is not None and windows is not None:
            # Of a method that cannot be merged the unmerged model is evaluated as well.
            times = 1 + (not METHODS[name].mergeable)
            times += len(own) if evaluation.each_round and len(own) > 1 else 0
            yield Stage(f"{name}: evaluation", times * windows)


def _work(shape: ModelShape) -> TokenWork:
    linears = sum(w.numel for w in shape.linears)
    return TokenWork(linears, shape.prunable, shape.head, shape.heads * shape.blocks)


def _forward(shape: ModelShape, length: int) -> float:
    """FLOP a token of a forward pass through the blocks."""
    return _work(shape).forward(length)


def _pruning(recipe: Recipe, shape: ModelShape, name: MethodName) -> float:
    """FLOP of one round's calibration and pruning."""
    calibration, pruner = recipe.calibration, get_pruner(recipe.prune)
    batch = min(calibration.batch_size, calibration.samples)
    # Each stream records one whole forward pass of a batch before it starts.
    stream = calibration.samples + batch
    samples = stream + (calibration.samples if pruner.statistic is not None else 0)
    if METHODS[name].dynamic:
        samples += stream
        if recipe.compares_samples:
            samples += min(calibration.cka_samples, calibration.samples) + batch
    work = samples * calibration.length * _forward(shape, calibration.length)
    return work + pruner.flops(pruning_shape(recipe, shape))


def _training(train: TrainConfig, shape: ModelShape) -> float:
    """FLOP a token of forward and backward passes, recomputation among them."""
    recomputed = _forward(shape, train.length) if train.activation_checkpointing else 0
    return _work(shape).training(train.length) + recomputed
