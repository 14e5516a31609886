"""Wanda: |W_ij| ||X_j||, per row (Sun et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from losa.errors import NumericsError
from losa.pruners.base import Pattern, Pruned
from losa.recipe import PruneConfig
from losa_kernels import wanda_mask


class Wanda:
    """Exactly floor(sparsity * in) weights go per row, ties lowest column first; kept weights stay as they are."""

    statistic = "input_norms"
    updates_weight = False

    def __init__(self, config: PruneConfig):
        del config

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        if not weight.isfinite().all():
            raise NumericsError("weight: expected finite values, got nan or inf")
        return Pruned(wanda_mask(weight, statistic, mask=mask, **pattern.as_kwargs()))
