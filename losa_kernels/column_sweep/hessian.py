"""The Hessian X^T X of a linear's inputs, summed over batches: half the work of a full product."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments

PANEL = 256  # columns that are multiplied at once; all work below the diagonal is inside such blocks


@torch.no_grad()
def accumulate_hessian(hessian: Tensor, x: Tensor) -> None:
    """hessian += x^T x on and above the diagonal, in place; :func:`complete_hessian` makes it whole at the end.

    Args:
        hessian: (in, in) fp32 or fp64.
        x: (tokens, in), any floating dtype, same device; multiplied in the Hessian's dtype. What is not finite makes
            the Hessian not finite, which ``inverse_factor`` and ``sparsegpt_prune`` refuse.

    Raises:
        ValueError: a wrong shape, dtype or device; names the argument.
    """
    _check(hessian)
    arguments.tensor("x", x)
    if x.dim() != 2 or x.shape[1] != len(hessian) or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (tokens, {len(hessian)}), got {x.dtype} {tuple(x.shape)}")
    if x.device != hessian.device:
        raise ValueError(f"x: expected on {hessian.device} as hessian, got {x.device}")
    x = x.to(hessian.dtype)
    for start in range(0, x.shape[1], PANEL):
        hessian[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])


@torch.no_grad()
def complete_hessian(hessian: Tensor) -> Tensor:
    """Copy what is above the diagonal blocks below them, in place; returns ``hessian``, exactly symmetric.

    Raises:
        ValueError: not (in, in) fp32 or fp64.
    """
    _check(hessian)
    for start in range(0, len(hessian), PANEL):
        end = min(start + PANEL, len(hessian))
        hessian[end:, start:end] = hessian[start:end, end:].T
        block = hessian[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).T)
    return hessian


def _check(hessian: Tensor) -> None:
    arguments.written_to("hessian", arguments.tensor("hessian", hessian))
    square = hessian.dim() == 2 and hessian.shape[0] == hessian.shape[1]
    if not square or hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"hessian: expected float32 or float64 (in, in), got {hessian.dtype} {tuple(hessian.shape)}")
