"""Rows of a linear that are pruned by what their outputs matter to the loss: each row has a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from losa.pruners.base import Pattern, Pruned, Pruner

# A row's energy counts as at most so many times the linear's median, and as at least that part of it: few samples tell
# little about rows far from the median. Of 4, 16 and no bound, 16 was best (SmolLM2 at 70 %, before training).
FARTHEST = 16.0


def tempered(outputs: Tensor) -> Tensor:
    """Energies of a linear's outputs, (out,), none farther than a factor ``FARTHEST`` from their median; as they are
    where the median is 0."""
    median = outputs.median()
    return outputs.clamp(median / FARTHEST, median * FARTHEST) if median > 0 else outputs


def row_factors(outputs: Tensor) -> Tensor:
    """By which a row's scores, which are of the size of a weight, are comparable with other rows': the square root of
    its energy over the median, (out,) fp64. Ones where the median is 0."""
    found = tempered(outputs)
    median = found.median()
    return (found / median).sqrt() if median > 0 else found.new_ones(found.shape)


class ByRows(Pruner):
    """A pruner of single linears for which weights of one row compete with those of all rows.

    Row i of the weight is pruned as f_i W_i: a pruner whose error is sum_i ||(W_i - B_i) X||^2 then makes
    sum_i f_i^2 ||(W_i - B_i) X||^2 small, which for f_i^2 = E[(dL/dy_i)^2] is, up to a factor, the loss that is
    expected to second order. The share that a pattern asks for is of the matrix.

    Args:
        pruner: of single linears; its statistic does not depend on the weight.
        factors: f by linear's name, (out,), above 0.
    """

    counts = "matrix"

    def __init__(self, pruner: Pruner, factors: Mapping[str, Tensor]):
        self._pruner, self._factors = pruner, factors
        self.statistic, self.updates_weight = pruner.statistic, pruner.updates_weight

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        self._pruner.prepare(statistics)

    def prune_named(
        self, name: str, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None
    ) -> Pruned:
        factors = self._factors[name].to(weight.device, weight.dtype)[:, None]
        pruned = self._pruner.prune_named(name, weight * factors, statistic, replace(pattern, whole=True), mask)
        if pruned.weight is not None:
            pruned.weight /= factors
        return pruned
