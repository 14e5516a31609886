"""Centred Gram in plain PyTorch: feature columns are centred first, products run in fp32, chunks are summed in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.tensors import wide_dtype

CHUNK = 1 << 12  # columns at a time: they stay in cache, and fp32 sums stay short


def gram(features: Tensor) -> Tensor:
    """features (L, n, p) -> (L, n, n) fp64."""
    wide = wide_dtype(features.dtype)
    count, samples, _ = features.shape
    total = torch.zeros(count, samples, samples, dtype=torch.float64, device=features.device)
    for matrix, accumulated in zip(features, total, strict=True):
        for part in matrix.split(CHUNK, dim=1):
            # Subtracting the first sample is exact where a component common to all samples dominates, and leaves
            # exact zeros of features that are the same for all samples; the mean of what remains rounds little.
            part = part.to(wide)
            part = part - part[:1]
            part -= part.mean(0)
            accumulated += part @ part.T
    return total
