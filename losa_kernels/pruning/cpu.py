"""Selection and sweep on a CPU: csrc/cpu/selection/, csrc/cpu/pruning/, and torch.linalg for the factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_kernels.pruning import blocks, reference

# A diagonal block that is inverted at once, and the width of a product with a triangle; both keep products efficient.
LEAF = 128
PANEL = 256
CHUNK = 1 << 20  # values that are moved at a time


def invert_upper_(upper: Tensor) -> Tensor:
    """An upper triangular matrix becomes its inverse, in a third of the work of solving for the identity, and with
    memory for a quarter of it.

    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]], halves in turn. The corner is two products with triangles,
    which run faster here than triangular solves.
    """
    n = len(upper)
    if n <= LEAF:
        return upper.copy_(reference.invert_upper(upper))
    half = n // 2 // 16 * 16
    A, B, C = invert_upper_(upper[:half, :half]), upper[:half, half:], invert_upper_(upper[half:, half:])
    product = torch.empty_like(B)
    for start in range(0, n - half, PANEL):
        end = start + PANEL
        torch.mm(B[:, :end], C[:end, start:end], out=product[:, start:end])
    for start in range(0, half, PANEL):
        torch.mm(A[start : start + PANEL, start:], product[start:], out=B[start : start + PANEL])
    B.neg_()
    return upper


def factor_with(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    """``reference.factor_with`` in the memory of one copy of the Hessian, and of a quarter: flipped, factored, flipped
    back and inverted in place."""
    work = hessian.mT.contiguous()
    if work.data_ptr() == hessian.data_ptr():
        work = work.clone()
    work.diagonal().copy_(diagonal)
    _reverse_(work.view(-1))
    # By columns, as LAPACK has it: torch copies any other matrix.
    _, info = torch.linalg.cholesky_ex(work.mT, out=(work.mT, torch.empty((), dtype=torch.int32)))
    if int(info):
        return None
    _reverse_(work.view(-1))
    return invert_upper_(work.mT)


def _reverse_(values: Tensor) -> None:
    """Reverse the order of (n,) values, which flips both dimensions of a contiguous matrix."""
    first, last = 0, len(values)
    while first < last:
        count = min(CHUNK, (last - first + 1) // 2)
        head = values[first : first + count].flip(0)
        values[first : first + count] = values[last - count : last].flip(0)
        values[last - count : last] = head
        first, last = first + count, last - count


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
