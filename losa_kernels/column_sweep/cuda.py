"""Selection and sweep on CUDA: csrc/cuda/{selection,wanda,column_sweep}.cu, and a trailing product per column block.

``LOSA_TRAILING=3xtf32`` runs those products on tensor cores, as three TF32 products of split operands; otherwise they
are fp32 products, whatever torch's global precision says. The blocks become one CUDA graph from the second call on
(``graph.py``; ``LOSA_SWEEP_GRAPH=0``: never).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from losa_kernels.column_sweep import blocks, reference
from losa_kernels.column_sweep.graph import CudaCapture, SweepGraphs

WIDEST_BLOCK = 128  # columns that sweep_block takes
# Columns whose errors reach what is right of them in one product: four times as deep as a block's, it moves the rest of
# the weight a quarter as often.
PANEL = 512
GROUPS = (4, 8, 16)

graphs = SweepGraphs(CudaCapture())


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    block_size: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(swept weight (out, in), packed mask, loss (out,)); an fp32 ``weight`` is given up.

    The reference serves fp64, blocks that are wider than 128 columns or begin inside a byte of the mask, groups other
    than 4, 8 and 16, and weights of nothing.
    """
    if weight.numel() == 0:
        return reference.column_sweep(weight, factor, sparsity, keep_n, m, block_size, mask)
    if weight.dtype != torch.float32 or block_size > WIDEST_BLOCK or block_size % 8 or m not in (None, *GROUPS):
        return reference.column_sweep(weight, factor, sparsity, keep_n, m, block_size, mask)
    split = os.environ.get("LOSA_TRAILING", "fp32").strip().lower()
    if split not in ("fp32", "3xtf32"):
        raise ValueError(f"LOSA_TRAILING: expected fp32 or 3xtf32, got {split!r}")
    update, precision = (update_rest_3xtf32, "tf32") if split == "3xtf32" else (blocks.update_rest, "ieee")

    def loop(weight: Tensor, factor: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return blocks.column_sweep(weight, factor, sparsity, keep_n, m, block_size, mask, update=update, panel=PANEL)

    with matmul_precision(precision):
        return graphs.run(loop, weight, factor.contiguous(), mask, (sparsity, keep_n, m, block_size, split))


def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    mask: Tensor | None,
) -> Tensor:
    """Packed mask by |W_ij| ||X_j||. The reference serves fp64 and groups other than 4, 8 and 16."""
    if weight.dtype not in blocks.NATIVE_WEIGHTS or m not in (None, *GROUPS) or weight.numel() == 0:
        return reference.wanda_mask(weight, input_norms, sparsity, keep_n, m, mask)
    faults = torch.zeros(1, dtype=torch.int32, device=weight.device)
    packed = blocks.wanda_mask(weight, input_norms, sparsity, keep_n, m, mask, faults)
    reference.raise_faults(int(faults))
    return packed


def split_tf32(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 x = high + low exactly, high with TF32's 10 bits after the point."""
    high = (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high


def update_rest_3xtf32(rest: Tensor, errors: Tensor, upper: Tensor) -> None:
    """``blocks.update_rest`` as high high + high low + low high, in one product three times as deep."""
    errors_high, errors_low = split_tf32(errors)
    upper_high, upper_low = split_tf32(upper)
    errors = torch.cat([errors_high, errors_high, errors_low], 1)
    rest.addmm_(errors, torch.cat([upper_high, upper_low, upper_high]), alpha=-1)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's fp32 precision of CUDA products, "ieee" or "tf32", inside the block."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    changes = (before == "tf32") != (name == "tf32")
    if changes:
        # The older of two switches: it sets both, and torch refuses to work while they disagree.
        settings.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        if changes:
            settings.allow_tf32 = before == "tf32"
        if settings.fp32_precision != before:
            settings.fp32_precision = before
