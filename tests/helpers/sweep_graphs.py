"""Sweeps with and without graphs: their inputs, and what equal results are."""

from __future__ import annotations

import torch

from losa_kernels import pack_mask
from losa_kernels.pruning import cuda, inverse_factor


def problem(seed, rows=12, columns=64, masked=False, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator)
    factor = inverse_factor(x.T @ x, 0.01)[0]
    mask = pack_mask(torch.rand(rows, columns, generator=generator) < 0.7) if masked else None
    return tuple(None if given is None else given.to(device) for given in (weight, factor, mask))


def sweep(given, keep_n=2, m=4, block_size=16, sparsity=None):
    weight, factor, mask = given
    goal = (None, keep_n, m) if sparsity is None else (sparsity, None, None)
    return cuda.column_sweep(weight.clone(), factor, *goal, block_size, mask)


def same(found, expected):
    return all(map(torch.equal, found, expected))
