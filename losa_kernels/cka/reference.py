"""Centred Gram in plain PyTorch: feature columns are centred first, products run in fp32, chunks are summed in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 14


def gram(features: Tensor, out: Tensor | None) -> Tensor:
    """features (L, n, p) -> (L, n, n), added to ``out`` where given."""
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    count, samples, columns = features.shape
    total = torch.zeros(count, samples, samples, dtype=torch.float64, device=features.device)
    for start in range(0, columns, CHUNK):
        part = features[:, :, start : start + CHUNK].to(wide)
        part = part - part.mean(1, keepdim=True)
        total += part @ part.transpose(1, 2)
    return total.to(wide) if out is None else out.copy_(total + out)
