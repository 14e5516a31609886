"""Magnitude: |W|, one threshold over the whole matrix."""

from __future__ import annotations

from torch import Tensor

from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa_kernels import pack_mask, unpack_mask, wanda_mask


class Magnitude(Pruner):
    """Exactly floor(sparsity * out * in) weights go, ties in row-major order (lowest row, then lowest column); N:M
    within each group of a row, ties lowest column first. Weights that ``mask`` has pruned count, and stay pruned even
    where there are more of them than asked."""

    counts = "matrix"

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        check_finite(weight)
        # With equal input norms Wanda's score is the magnitude.
        if pattern.sparsity is None:
            flat = weight.new_ones(weight.shape[1])
            return Pruned(wanda_mask(weight, flat, mask=mask, **pattern.as_kwargs()))
        # The matrix as one row: the count is over all of it, and ties go in its order.
        if mask is not None:
            mask = pack_mask(unpack_mask(mask, weight.shape[1]).reshape(1, -1))
        kept = wanda_mask(weight.reshape(1, -1), weight.new_ones(weight.numel()), sparsity=pattern.sparsity, mask=mask)
        return Pruned(pack_mask(unpack_mask(kept, weight.numel()).view(weight.shape)))
