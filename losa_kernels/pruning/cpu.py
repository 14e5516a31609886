"""Selection and sweep on a CPU: csrc/cpu/selection/, csrc/cpu/pruning/, and torch.linalg for the factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_kernels.pruning import blocks, reference
from losa_kernels.pruning.in_place import flipped_cholesky, invert_upper_


def factor_with(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    """``reference.factor_with`` in little memory (``losa_kernels.pruning.in_place``)."""
    upper, info = flipped_cholesky(hessian, diagonal)
    return invert_upper_(upper) if int(info) == 0 else None


def inverse_factors(
    hessians: Sequence[Tensor], damping: float
) -> list[tuple[Tensor, float] | reference.SingularHessianError]:
    """``reference.inverse_factors`` with the factor above."""
    return reference.inverse_factors(hessians, damping, factor_with)


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    block_size: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(swept weight (out, in), packed mask, loss (out,)); an fp32 ``weight`` is given up. fp64: the reference."""
    run = reference.column_sweep if weight.dtype != torch.float32 else blocks.column_sweep
    return run(weight, factor, sparsity, keep_n, m, block_size, mask)


def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    mask: Tensor | None,
) -> Tensor:
    """Packed mask by |W_ij| ||X_j||, the smallest pruned per row or group. fp64: the reference."""
    if weight.dtype not in blocks.NATIVE_WEIGHTS:
        return reference.wanda_mask(weight, input_norms, sparsity, keep_n, m, mask)
    reference.check_values(weight, input_norms)
    return blocks.wanda_mask(weight, input_norms, sparsity, keep_n, m, mask)
