"""Magnitude: |W|, one threshold over the whole matrix."""

from __future__ import annotations

from torch import Tensor

from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa_kernels import wanda_mask


class Magnitude(Pruner):
    """Exactly floor(sparsity * out * in) weights go, ties in row-major order (lowest row, then lowest column); N:M
    within each group of a row, ties lowest column first. Weights that ``mask`` has pruned count, and stay pruned even
    where there are more of them than asked."""

    counts = "matrix"

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        check_finite(weight)
        # With equal input norms Wanda's score is the magnitude.
        flat, whole = weight.new_ones(weight.shape[1]), pattern.sparsity is not None
        return Pruned(wanda_mask(weight, flat, mask=mask, whole=whole, **pattern.as_kwargs()))
