"""Wanda: |W_ij| ||X_j||, per row (Sun et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa_kernels import wanda_mask


class Wanda(Pruner):
    """Exactly floor(sparsity * in) weights go per row, or floor(sparsity * out * in) of a pattern that is ``whole``;
    ties lowest row, then lowest column first; kept weights stay as they are."""

    statistic = "input_norms"
    counts = "either"

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        assert statistic is not None
        try:
            return Pruned(wanda_mask(weight, statistic, mask=mask, whole=pattern.whole, **pattern.as_kwargs()))
        except ValueError:
            check_finite(weight)  # to name what is wrong; the mask's own check has found it in the same pass
            raise
