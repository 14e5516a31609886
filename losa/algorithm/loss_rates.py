"""Rates of all blocks or linears at once, by what pruning them is expected to cost in loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from losa.algorithm.block import WrappedBlock
from losa.algorithm.linear_rates import LinearRates, counts_within, floored
from losa.algorithm.rates import MAX_RATE
from losa.pruners.base import Pattern

# A block's rate is a multiple of 1 / STEPS.
STEPS = 10_000

Curves = Sequence[Mapping[str, Tensor]]
"""Each block's curves of ``losa.algorithm.expected_loss.loss_curve``, by linear's name."""


def rates_of_linears(
    blocks: Sequence[WrappedBlock], curves: Curves, sparsity: float, delta: float, nested: bool
) -> list[LinearRates]:
    """Rates of every linear of the model, of which together as many weights go as with one rate ``sparsity``: the least
    expected loss within ``box``. ``LinearRates.removed`` is the share of a linear's own loss that goes.

    Args:
        blocks: of the model.
        curves: of all their linears.
        sparsity: of all together.
        delta: of ``box``.
        nested: no linear gets a lower rate than it has reached.
    """
    linears = {(i, name): linear for i, block in enumerate(blocks) for name, linear in block.linears.items()}
    rows = {key: linear.out_features for key, linear in linears.items()}
    own = {(i, name): curve for i, block in enumerate(curves) for name, curve in block.items()}
    shares = {
        key: floored(own[key], linear.sparsity * nested) / linear.weight.numel() for key, linear in linears.items()
    }
    counts = counts_within(shares, rows, sparsity, *box(sparsity, delta))
    found = [LinearRates({}, {}) for _ in blocks]
    for (index, name), count in counts.items():
        width = linears[index, name].in_features
        found[index].patterns[name] = Pattern(sparsity=count / width)
        curve = own[index, name]
        found[index].removed[name] = float(curve[count] / curve[-1]) if curve[-1] > 0 else count / width
    return found


def rates_of_blocks(
    blocks: Sequence[WrappedBlock], curves: Curves, sparsity: float, delta: float, nested: bool
) -> list[float]:
    """As ``rates_of_linears``, where a block's linears have one rate. The mean rate, by the blocks' sizes, is the
    target up to 1 / STEPS."""
    sizes = {i: sum(linear.weight.numel() for linear in block.linears.values()) for i, block in enumerate(blocks)}
    grid = np.linspace(0, 1, STEPS + 1)
    shares = {}
    for index, block in enumerate(curves):
        # A row loses whole weights; between two counts the curve is a line.
        parts = [np.interp(grid, np.linspace(0, 1, len(curve)), curve.numpy()) for curve in block.values()]
        reached = blocks[index].sparsity() * nested
        shares[index] = floored(torch.from_numpy(np.sum(parts, axis=0)), reached) / (sizes[index] * STEPS)
    counts = counts_within(shares, sizes, sparsity, *box(sparsity, delta))
    return [counts[index] / STEPS for index in range(len(blocks))]


def box(sparsity: float, delta: float) -> tuple[float, float]:
    """Lowest and highest rate about the mean ``sparsity``: none lower by more than ``delta``, and none that loses more
    than the share ``delta`` of the density 1 - sparsity."""
    return max(sparsity - delta, 0.0), min(1 - (1 - sparsity) * (1 - delta), MAX_RATE)
