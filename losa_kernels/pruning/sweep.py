"""SparseGPT's column sweep: prune a linear and compensate for what goes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.pruning.checks import check_hessian_of, check_problem, check_used_damping
from losa_kernels.pruning.hessian import inverse_factor
from losa_kernels.tensors import all_finite, wide_dtype


class SweepResult(NamedTuple):
    """``weight`` (out, in) fp32 (fp64 for fp64 input), +0.0 where pruned; ``mask`` packed uint8; ``loss`` (out,) half
    of each row's squared output error with the damped Hessian, which is the sum of SparseGPT's e^2 / 2 over pruned
    entries; ``damping`` the share of the mean diagonal that the factor or the spectrum needed."""

    weight: Tensor
    mask: Tensor
    loss: Tensor
    damping: float


@torch.no_grad()
def sparsegpt_prune(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float | None = None,
    keep_n: int | None = None,
    m: int | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    mask: Tensor | None = None,
    factor: tuple[Tensor, float] | None = None,
) -> SweepResult:
    """Prune and compensate (SparseGPT, Frantar and Alistarh 2023).

    With U the upper Cholesky factor of H^-1, columns in order: score w^2 / U_jj^2 from the current weights picks what
    goes; e = (w_i - q_i) / U_ii; W_{:, i:} -= e U_{i, i:}. Unstructured: over all rows of each column block, exactly
    floor(sparsity * out * in) in all. keep_n:m: chosen inside the sweep from updated weights. Entries are ordered by
    (score, column, row): ties go lowest column first, then lowest row.

    Args:
        weight: (out, in) floating point, not changed; computed in fp32 (fp64 for fp64).
        hessian: (in, in) X^T X, same device, not changed. Columns never active (H_jj = 0) are pruned to zero at no loss
            where the pattern lets them go, and are zero in any case.
        sparsity: 0 <= s < 1; or keep_n of every m kept.
        damping: share of the mean diagonal added, 0 < damping <= 1; grows tenfold, up to 1, until the factor exists.
        block_size: columns per block, a multiple of m for keep_n:m; more than there are: all of them in one.
        mask: packed; weights already pruned stay pruned and count, and where the matrix (keep_n:m: a group) has lost
            more than asked, nothing else goes. Their values are compensated for like any other pruned weight's: pass
            zeros there if that has happened already. With sparsity=0 this is the elimination for a given mask.
        factor: ``inverse_factor(hessian, damping)``, for weights that share a Hessian; ``damping`` is then unused.

    Raises:
        ValueError: a bad argument; or a weight, Hessian or factor that is not finite, or so large that the swept weight
            or its loss would not be. No result is not finite.
        SingularHessianError: no damping up to 1 gives a factor.
    """
    sparsity, keep_n, m = check_problem(weight, sparsity, keep_n, m, mask)
    columns = weight.shape[1]
    check_hessian_of(weight, hessian)
    block_size = arguments.integer("block_size", block_size)
    if block_size < 1 or (m is not None and block_size % m):
        expected = "a positive number" if m is None else f"a positive multiple of m={m}"
        raise ValueError(f"block_size: expected {expected}, got {block_size}")
    # A wider block would be the same one; this one begins at a whole byte of the mask and at a whole group.
    block_size = min(block_size, -(-max(columns, 1) // (8 * (m or 1))) * 8 * (m or 1))
    wide = wide_dtype(weight.dtype)
    work = weight.to(wide, copy=True)
    if not all_finite(work):
        raise ValueError("weight: expected finite values, got nan or inf")
    if factor is None:
        factor = inverse_factor(hessian.to(wide), damping)
    elif not isinstance(factor, tuple | list) or len(factor) != 2:
        raise ValueError(f"factor: expected (U, damping) of inverse_factor, got {type(factor).__name__}")
    else:
        _check_factor(arguments.tensor("factor", factor[0]), hessian, weight)
    upper, used = factor[0], check_used_damping("factor", factor[1])
    dead = hessian.diagonal() == 0
    if dead.any():
        work[:, dead] = 0
    sweep = dispatch.implementation("column_sweep", weight.device)
    swept, packed, loss = sweep(work, upper, sparsity, keep_n, m, block_size, mask)
    if not all_finite(swept) or not all_finite(loss):
        raise ValueError(f"weight: too large: what pruning makes of it, or the loss, is beyond {wide}")
    return SweepResult(swept, packed, loss, used)


def _check_factor(upper: Tensor, hessian: Tensor, weight: Tensor) -> None:
    columns, wide = weight.shape[1], wide_dtype(weight.dtype)
    if tuple(upper.shape) != (columns, columns) or upper.dtype != wide or upper.device != weight.device:
        raise ValueError(
            f"factor: expected {wide} ({columns}, {columns}) on {weight.device}, "
            f"got {upper.dtype} {tuple(upper.shape)} on {upper.device}"
        )
    if not all_finite(upper) or not bool((upper.diagonal() > 0).all()):
        raise ValueError("factor: expected finite values and a positive diagonal")
    if not all_finite(hessian):
        raise ValueError("hessian: expected finite values, got nan or inf")
