"""Weights and masks that packing may not lose a bit of."""

from __future__ import annotations

import torch

from losa_kernels.tensors import as_bits


def hostile(rows, columns, dtype, seed=0):
    """A weight with every value that a careless format loses."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    flat = weight.view(-1)
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan")]
    where = torch.randperm(flat.numel(), generator=generator)[: 4 * len(special)]
    for position, value in zip(where, special * 4, strict=False):
        flat[position] = value
    if flat.numel() > 40:
        bits = as_bits(weight).view(-1)
        bits[where[4]] += 1  # a NaN with another payload
    return weight


def nm_mask(rows, columns, keep_n, m, seed=0):
    """(rows, columns) bool with ``keep_n`` of every ``m``."""
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(keep_n, 2).indices, True)
    return kept.reshape(rows, columns)


def expected_bits(weight, kept):
    """Bits of the weight with +0.0 where it is pruned."""
    return as_bits(weight).masked_fill(~kept, 0)
