"""The inverse factor in the memory of one copy of its Hessian and a quarter, on any device: flipped, factored, flipped
back and inverted in place."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.pruning import reference

# A diagonal block that is inverted at once, and the width of a product with a triangle; both keep products efficient.
LEAF = 128
PANEL = 256
CHUNK = 1 << 20  # values that are moved at a time


def flipped_cholesky(hessian: Tensor, diagonal: Tensor, by_rows: bool = False) -> tuple[Tensor, Tensor]:
    """(R, info): an upper triangular R with R R^T = H of that diagonal, in new memory, and what the library says of it:
    0 where it is right. R is contiguous ``by_rows``, and else a transposed view. The library rounds the two in ways of
    its own: one reads the upper triangle, the other one the lower."""
    # Flipped, the triangle that the library reads is the upper one of the Hessian.
    work = (hessian if by_rows else hessian.mT).contiguous()
    if work.data_ptr() == hessian.data_ptr():
        work = work.clone()
    work.diagonal().copy_(diagonal)
    _reverse_(work.view(-1))
    # By columns, as the library has it: torch copies any other matrix.
    info = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work.mT, upper=by_rows, out=(work.mT, info))
    _reverse_(work.view(-1))
    return work if by_rows else work.mT, info


def invert_upper_(upper: Tensor) -> Tensor:
    """An upper triangular matrix becomes its inverse, in a third of the work of solving for the identity, and with
    memory for a quarter of it.

    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]], halves in turn. The corner is two products with triangles,
    which run faster than triangular solves.
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


def _reverse_(values: Tensor) -> None:
    """Reverse the order of (n,) values, which flips both dimensions of a contiguous matrix."""
    first, last = 0, len(values)
    while first < last:
        count = min(CHUNK, (last - first + 1) // 2)
        head = values[first : first + count].flip(0)
        values[first : first + count] = values[last - count : last].flip(0)
        values[last - count : last] = head
        first, last = first + count, last - count
