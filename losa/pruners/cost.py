"""What pruning costs, for `losa plan`: counted from the shapes of linears before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from losa_kernels.pruning.factor import TOGETHER


@dataclass(frozen=True)
class LinearShape:
    """Features that go in and out of one linear."""

    inputs: int
    outputs: int

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class PruningShape:
    """``linears``: all linears that are pruned, in ``blocks`` blocks; ``tokens``: of all calibration samples;
    ``on_gpu``: whether pruning runs there; ``statistics``: bytes of statistics that are held at a time, unless one
    linear's take more."""

    linears: list[LinearShape]
    blocks: int
    tokens: int
    on_gpu: bool
    statistics: float = math.inf


@dataclass(frozen=True)
class Memory:
    """``size`` bytes held on the pruning device while a block is pruned; ``how`` says how they are counted.
    ``certain``: whether it cannot be less. ``collected``: it is there while the block runs, before it is pruned."""

    what: str
    size: float
    how: str
    certain: bool = True
    collected: bool = False


def one_linear_memory(shape: PruningShape, copies: int = 5) -> Memory:
    """Scores, masks and fp32 copies of one linear at a time."""
    widest = max(linear.numel for linear in shape.linears)
    return Memory("pruning one linear", copies * 4 * widest, f"{copies} fp32 copies of the largest linear")


def hessians_of_block(shape: PruningShape) -> Memory:
    """Hessians of a block's linears, or of as many of them as there may be at a time."""
    how = "in^2 x 4 bytes a linear, at most: inputs are shared"
    return Memory("Hessians of a block", _at_a_time(shape), how, certain=False, collected=True)


def factorising_one(shape: PruningShape, copies: float = 5) -> Memory:
    """An eigendecomposition of one Hessian at a time, or a factor."""
    return Memory("factorising one", copies * 4 * _largest_square(shape), f"{copies:g} copies of the largest")


def hessian_memory(shape: PruningShape) -> list[Memory]:
    """Hessians of a block's linears, and their factors."""
    if not shape.on_gpu:
        return [hessians_of_block(shape), factorising_one(shape, 1.25)]
    held = _at_a_time(shape)
    largest = 4 * _largest_square(shape)
    # A Hessian beyond that is factored in place.
    factored = max(5 * min(held, TOGETHER), 1.25 * largest if largest > TOGETHER else 5 * largest)
    how = f"5 copies of at most {TOGETHER >> 20} MiB of Hessians, 1.25 of a larger one"
    return [
        hessians_of_block(shape),
        # Where they do not fit, Hessians are factored one by one.
        Memory("factors of a block", held, "as the Hessians", certain=False),
        Memory("factorising", factored, how, certain=False),
    ]


def in_several_passes(shape: PruningShape) -> bool:
    """Whether a block's Hessians are more than there may be at a time."""
    return 4 * _squares(shape) > shape.statistics


def _at_a_time(shape: PruningShape) -> float:
    return min(4 * _squares(shape), max(shape.statistics, 4 * _largest_square(shape)))


def _squares(shape: PruningShape) -> float:
    # Blocks of a model are alike but for few, so that the average block stands for all of them.
    return sum(linear.inputs**2 for linear in shape.linears) / shape.blocks


def _largest_square(shape: PruningShape) -> int:
    return max(linear.inputs for linear in shape.linears) ** 2


def hessian_flops(shape: PruningShape, work: Callable[[LinearShape], float]) -> float:
    """X^T X of every linear, and ``work``: what a method makes of the Hessian and the weight."""
    return sum(2.0 * shape.tokens * linear.inputs**2 + work(linear) for linear in shape.linears)
