"""The Hessian X^T X of a linear's inputs, summed over batches: half the work of a full product."""

from __future__ import annotations

from torch import Tensor

PANEL = 256  # columns that are multiplied at once; all work below the diagonal is inside such blocks


def accumulate_hessian(hessian: Tensor, x: Tensor) -> None:
    """hessian += x^T x on and above the diagonal, in place; :func:`complete_hessian` makes it whole at the end.

    Args:
        hessian: (in, in) fp32 or fp64.
        x: (tokens, in), any floating dtype, same device; multiplied in the Hessian's dtype.
    """
    x = x.to(hessian.dtype)
    for start in range(0, x.shape[1], PANEL):
        hessian[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])


def complete_hessian(hessian: Tensor) -> Tensor:
    """Copy what is above the diagonal blocks below them, in place; returns ``hessian``, exactly symmetric."""
    for start in range(0, len(hessian), PANEL):
        end = min(start + PANEL, len(hessian))
        hessian[end:, start:end] = hessian[start:end, end:].T
        block = hessian[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).T)
    return hessian
