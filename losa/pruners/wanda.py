"""Wanda: |W_ij| ||X_j||, per row (Sun et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from losa.pruners.base import Pattern, Pruned, check_finite
from losa.recipe.sections import PruneConfig
from losa_kernels import wanda_mask


class Wanda:
    """Exactly floor(sparsity * in) weights go per row, ties lowest column first; kept weights stay as they are."""

    statistic = "input_norms"
    updates_weight = False

    def __init__(self, config: PruneConfig):
        del config

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        try:
            return Pruned(wanda_mask(weight, statistic, mask=mask, **pattern.as_kwargs()))
        except ValueError:
            check_finite(weight)  # the mask's own check tells it, in one pass
            raise
