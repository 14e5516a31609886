"""Selection and sweep on a CPU: csrc/cpu/selection/, csrc/cpu/pruning/, and torch.linalg for the factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_kernels.pruning import blocks, reference

# A diagonal block that is inverted at once, and the width of a product with a triangle; both keep products efficient.
LEAF = 128
PANEL = 256


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, in a third of the work of solving for the identity.

    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]], halves in turn. The corner is two products with triangles,
    which run faster here than triangular solves.
    """
    inverse = torch.zeros_like(upper)
    _invert_upper_into(upper, inverse)
    return inverse


def _invert_upper_into(upper: Tensor, inverse: Tensor) -> None:
    n = len(upper)
    if n <= LEAF:
        inverse.copy_(reference.invert_upper(upper))
        return
    half = n // 2 // 16 * 16
    A, B, C = inverse[:half, :half], upper[:half, half:], inverse[half:, half:]
    _invert_upper_into(upper[:half, :half], A)
    _invert_upper_into(upper[half:, half:], C)
    product = torch.empty_like(B)
    for start in range(0, n - half, PANEL):
        end = start + PANEL
        torch.mm(B[:, :end], C[:end, start:end], out=product[:, start:end])
    corner = inverse[:half, half:]
    for start in range(0, half, PANEL):
        torch.mm(A[start : start + PANEL, start:], product[start:], out=corner[start : start + PANEL])
    corner.neg_()


def inverse_factors(
    hessians: Sequence[Tensor], damping: float
) -> list[tuple[Tensor, float] | reference.SingularHessianError]:
    """``reference.inverse_factors`` with the inverse above."""
    return reference.inverse_factors(hessians, damping, invert_upper)


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
