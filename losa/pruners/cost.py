"""What pruning costs, for `losa plan`: counted from the shapes of linears before any weight is loaded."""

from __future__ import annotations

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
    ``on_gpu``: whether pruning runs there."""

    linears: list[LinearShape]
    blocks: int
    tokens: int
    on_gpu: bool


@dataclass(frozen=True)
class Memory:
    """``size`` bytes held on the pruning device while a block is pruned; ``how`` says how they are counted."""

    what: str
    size: float
    how: str


def one_linear_memory(shape: PruningShape) -> Memory:
    """Scores, masks and fp32 copies of one linear at a time."""
    widest = max(linear.numel for linear in shape.linears)
    return Memory("pruning one linear", 5 * 4 * widest, "5 fp32 copies of the largest linear")


def hessian_memory(shape: PruningShape) -> list[Memory]:
    """Hessians of a block's linears, and their factors."""
    # Blocks of a model are alike but for few, so that the average block stands for all of them.
    squares = sum(linear.inputs**2 for linear in shape.linears) / shape.blocks
    largest = max(linear.inputs for linear in shape.linears) ** 2
    held = [Memory("Hessians of a block", 4 * squares, "in^2 x 4 bytes a linear, at most: inputs are shared")]
    if not shape.on_gpu:
        return [*held, Memory("factorising one", 5 * 4 * largest, "5 copies of the largest")]
    together = max(4 * largest, min(4 * squares, TOGETHER))
    how = f"5 copies of at most {TOGETHER >> 20} MiB of Hessians"
    return [
        *held,
        Memory("factors of a block", 4 * squares, "as the Hessians"),
        Memory("factorising", 5 * together, how),
    ]


def hessian_flops(shape: PruningShape) -> float:
    """X^T X, its factor, and the sweep over columns, for every linear."""
    return sum(
        2.0 * shape.tokens * linear.inputs**2 + 4 / 3 * linear.inputs**3 + linear.numel * linear.inputs
        for linear in shape.linears
    )
