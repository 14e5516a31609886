"""Magnitude: |W|, one threshold over the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from losa.pruners.base import Pattern, Pruned, check_finite
from losa.recipe import PruneConfig
from losa_kernels import pack_mask, unpack_mask, wanda_mask


class Magnitude:
    """Exactly floor(sparsity * out * in) weights go, ties in row-major order (lowest row, then lowest column); N:M
    within each group of a row, ties lowest column first. What ``mask`` has pruned counts; more than asked stays."""

    statistic = "none"
    updates_weight = False

    def __init__(self, config: PruneConfig):
        del config

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        check_finite(weight)
        if pattern.sparsity is None:
            # With equal input norms Wanda's score orders a group by magnitude.
            flat = weight.new_ones(weight.shape[1])
            return Pruned(wanda_mask(weight, flat, mask=mask, **pattern.as_kwargs()))
        scores = weight.abs()
        # The guard counts a product that is an integer but for rounding as that integer.
        count = int(pattern.sparsity * scores.numel() + 1e-6)
        if mask is not None:
            gone = ~unpack_mask(mask, weight.shape[1])
            scores.masked_fill_(gone, -1)
            count = max(count, int(gone.count_nonzero()))
        return Pruned(pack_mask(~_smallest(scores, count)))


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Bool like ``scores``: exactly ``count`` smallest entries of the whole matrix, ties in row-major order."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    chosen[tied[: count - int(chosen.count_nonzero())]] = True
    return chosen.reshape(scores.shape)
