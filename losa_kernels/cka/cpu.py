"""Centred Gram on a CPU: the reference's arithmetic in kept memory, with products that occupy all threads.

An n x n product with a long inner side leaves nothing to divide between threads; a batch of shorter ones does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.scratch import scratch

COLUMNS = 1 << 14  # centred at a time, so that they are multiplied from the (last) cache
PARTS = 16  # products they are divided into; their sum is taken in fp64


def gram(features: Tensor, out: Tensor | None) -> Tensor:
    """features (L, n, p) -> (L, n, n), added to ``out`` where given."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    count, samples, columns = features.shape
    total = torch.zeros(count, samples, samples, dtype=torch.float64)
    for matrix, accumulated in zip(features, total, strict=True):
        for start in range(0, columns, COLUMNS):
            accumulated += _centred_product(matrix[:, start : start + COLUMNS], wide)
    return total.to(wide) if out is None else out.copy_(total + out)


def _centred_product(part: Tensor, wide: torch.dtype) -> Tensor:
    samples, columns = part.shape
    width = -(-columns // PARTS)
    centred = scratch("centred", (samples, PARTS * width), wide)
    used = centred[:, :columns]
    if part.dtype == wide:
        torch.sub(part, part[:1], out=used)
    else:
        used.copy_(part)
        used -= used[:1].clone()
    used -= used.mean(0)
    centred[:, columns:] = 0
    parts = centred.view(samples, PARTS, width).transpose(0, 1)
    products = scratch("products", (PARTS, samples, samples), wide)
    return torch.bmm(parts, parts.mT, out=products).sum(0, dtype=torch.float64)
