"""Rows of a linear that are pruned by what their outputs matter to the loss: each row has a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from losa.pruners.base import Pattern, Pruned, Pruner

# A row's energy counts as at most so many times the linear's median, and as at least that part of it: few samples tell
# little about rows far from the median.
FARTHEST = 16.0


def bounded(outputs: Tensor) -> Tensor:
    """Energies of a linear's outputs, (out,), none farther than a factor ``FARTHEST`` from the median of those that are
    not zero. Zeros where all are."""
    positive = outputs[outputs > 0]
    if not len(positive):
        return outputs
    median = positive.median()
    return outputs.clamp(median / FARTHEST, median * FARTHEST)


def row_scales(outputs: Tensor) -> Tensor:
    """By which a row's weights are comparable with other rows': the square root of its bounded energy over the median
    one, (out,) fp64; ones where no row has any energy."""
    found = bounded(outputs)
    median = found.median()
    return (found / median).sqrt() if median > 0 else found.new_ones(found.shape)


class ByRows(Pruner):
    """A pruner of single linears for which weights of one row compete with those of all rows.

    Row i of the weight is pruned as f_i W_i: a pruner whose error is sum_i ||(W_i - B_i) X||^2 then makes
    sum_i f_i^2 ||(W_i - B_i) X||^2 small, which for f_i^2 = E[(dL/dy_i)^2] is, up to a factor, the loss that is
    expected to second order. The share that a pattern asks for is of the matrix.

    Args:
        pruner: of single linears; it can count over the matrix.
        scales: f by linear's name, (out,), above 0.
        of_gradients: whether the pruner's statistic is of gradients by the weight, (out, in): those by f_i W_i are
            1 / f_i as large.
    """

    counts = "matrix"

    def __init__(self, pruner: Pruner, scales: Mapping[str, Tensor], of_gradients: bool = False):
        self._pruner, self._scales, self._of_gradients = pruner, scales, of_gradients
        self.statistic, self.updates_weight = pruner.statistic, pruner.updates_weight

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        self._pruner.prepare(statistics)

    def prune_named(
        self, name: str, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None
    ) -> Pruned:
        scales = self._scales[name].to(weight.device, weight.dtype)[:, None]
        if self._of_gradients and statistic is not None:
            statistic = statistic / scales
        pruned = self._pruner.prune_named(name, weight * scales, statistic, replace(pattern, whole=True), mask)
        if pruned.weight is not None:
            pruned.weight /= scales
        return pruned
