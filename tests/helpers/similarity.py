"""Similarity between blocks, made up."""

from __future__ import annotations

import torch


def similarity(count, seed):
    g = torch.Generator().manual_seed(seed)
    half = torch.rand(count, count, generator=g, dtype=torch.float64)
    matrix = (half + half.T) / 2
    return matrix.fill_diagonal_(1)
