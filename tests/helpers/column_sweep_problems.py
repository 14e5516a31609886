"""Weights and Hessians for tests of sweeps and selections."""

from __future__ import annotations

import torch

from losa_kernels.pruning import blocks


def hessian(columns, spread=1.0, dtype=torch.float64, seed=0, tokens=None):
    """Of Gaussian tokens, 4 a column by default, whose columns shrink from 1 to 10^-spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -spread, columns, dtype=torch.float64)
    return (x.T @ x).to(dtype)


def tied(rows, columns, seed=0):
    """Few distinct values, zeros of both signs among them."""
    values = torch.randint(-3, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    return torch.where((values == 0) & (torch.arange(columns) % 2 == 0), -0.0, values)


def operands(rows=5, columns=24, width=8):
    """Arguments of select_block and sweep_block."""
    return {
        "weight": torch.randn(rows, columns),
        "factor": torch.eye(columns),
        "mask": torch.full((rows, columns // 8), 0xF7, dtype=torch.uint8),
        "kept": torch.zeros(rows, columns // 8, dtype=torch.uint8),
        "scratch": torch.zeros(rows, width),
        "state": torch.zeros(blocks.STATE, dtype=torch.int32),
        "loss": torch.zeros(rows),
    }
