"""Magnitude: |W|, one threshold over the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from losa.pruners.base import Pattern, Pruned
from losa.recipe import PruneConfig
from losa_kernels import pack_mask, unpack_mask, wanda_mask


class Magnitude:
    """Exactly floor(sparsity * out * in) weights go, ties in row-major order; N:M within each group of a row."""

    statistic = "none"
    updates_weight = False

    def __init__(self, config: PruneConfig):
        del config

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        if pattern.sparsity is None:
            # Within a group of one row all input norms being equal, Wanda's score orders by magnitude.
            flat = weight.new_ones(weight.shape[1])
            return Pruned(wanda_mask(weight, flat, mask=mask, **pattern.as_kwargs()))
        gone = None if mask is None else ~unpack_mask(mask, weight.shape[1])
        row = weight.reshape(1, -1)
        existing = None if gone is None else pack_mask(~gone.reshape(1, -1))
        chosen = wanda_mask(row, torch.ones_like(row[0]), sparsity=pattern.sparsity, mask=existing)
        return Pruned(pack_mask(unpack_mask(chosen, row.shape[1]).reshape(weight.shape)))
