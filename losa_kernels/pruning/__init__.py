"""Pruning one linear: SparseGPT's Hessian-aware column sweep, and Wanda's score."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.bitmask import check_packed, packed_width
from losa_kernels.pruning import cuda as sweep_on_cuda
from losa_kernels.pruning import factor as factor_on_cuda
from losa_kernels.pruning.hessian import accumulate_hessian, complete_hessian
from losa_kernels.pruning.reference import MAX_DAMPING, SingularHessianError, check_values
from losa_kernels.tensors import all_finite

__all__ = [
    "SingularHessianError",
    "SweepResult",
    "accumulate_hessian",
    "checks_together",
    "complete_hessian",
    "free_graphs",
    "inverse_factor",
    "inverse_factors",
    "sparsegpt_prune",
    "wanda_mask",
]


class SweepResult(NamedTuple):
    """``weight`` (out, in) fp32 (fp64 for fp64 input), +0.0 where pruned; ``mask`` packed uint8; ``loss`` (out,) the
    sum of e^2 / 2 over a row's pruned entries; ``damping`` the share of the mean diagonal that the factor needed."""

    weight: Tensor
    mask: Tensor
    loss: Tensor
    damping: float


@torch.no_grad()
def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + d mean(diag H) I)^-1, and the damping d that was needed.

    A zero on the diagonal (an input that was never active) counts as 1, in the mean too.

    Args:
        hessian: (in, in) floating point, symmetric (the upper triangle is read), not changed; computed in fp32 (fp64
            for fp64).
        damping: first d tried, 0 < d <= 1; grows tenfold, up to 1, until the factor exists and is finite.

    Raises:
        ValueError: a wrong shape or damping, or a non-finite Hessian; names the argument.
        SingularHessianError: no damping up to 1 makes it positive definite.
    """
    hessian, damping = _check_hessian(hessian), _check_damping(damping)
    return dispatch.implementation("inverse_factor", hessian.device)(hessian, damping)


@torch.no_grad()
def inverse_factors(hessians: Sequence[Tensor], damping: float) -> list[tuple[Tensor, float] | SingularHessianError]:
    """:func:`inverse_factor` of each Hessian, or its SingularHessianError: one's damping is not the others'. On CUDA
    several are factored at a time.

    Raises:
        ValueError: a wrong shape, device or damping, or a non-finite Hessian; names the argument.
    """
    damping, hessians = _check_damping(damping), [_check_hessian(hessian) for hessian in hessians]
    if not hessians:
        return []
    devices = {hessian.device for hessian in hessians}
    if len(devices) > 1:
        raise ValueError(f"hessian: expected all on one device, got {', '.join(sorted(map(str, devices)))}")
    run = dispatch.implementation("inverse_factor", hessians[0].device)
    if run is factor_on_cuda.inverse_factor:
        return factor_on_cuda.inverse_factors(hessians, damping)
    found: list[tuple[Tensor, float] | SingularHessianError] = []
    for hessian in hessians:
        try:
            found.append(run(hessian, damping))
        except SingularHessianError as error:
            # Its traceback would keep all Hessians alive.
            found.append(error.with_traceback(None))
    return found


def _check_hessian(hessian: Tensor) -> Tensor:
    """In the dtype that it is factored in."""
    arguments.with_data("hessian", arguments.tensor("hessian", hessian))
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.is_floating_point():
        raise ValueError(f"hessian: expected floating point (in, in), got {hessian.dtype} {tuple(hessian.shape)}")
    hessian = hessian.to(_wide(hessian))
    if not all_finite(hessian):
        raise ValueError(f"hessian: expected finite values in {hessian.dtype}, got nan or inf")
    return hessian


def _check_damping(damping: float) -> float:
    damping = arguments.number("damping", damping)
    if not 0 < damping <= MAX_DAMPING:
        raise ValueError(f"damping: expected 0 < damping <= {MAX_DAMPING:g}, got {damping}")
    return damping


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
    sparsity, keep_n, m = _check(weight, sparsity, keep_n, m, mask)
    columns = weight.shape[1]
    arguments.tensor("hessian", hessian)
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(f"hessian: expected ({columns}, {columns}), got {tuple(hessian.shape)}")
    if not hessian.is_floating_point():
        raise ValueError(f"hessian: expected floating point, got {hessian.dtype}")
    if hessian.device != weight.device:
        raise ValueError(f"hessian: expected on {weight.device} as weight, got {hessian.device}")
    block_size = arguments.integer("block_size", block_size)
    if block_size < 1 or (m is not None and block_size % m):
        expected = "a positive number" if m is None else f"a positive multiple of m={m}"
        raise ValueError(f"block_size: expected {expected}, got {block_size}")
    # A wider block would be the same one; this one begins at a whole byte of the mask and at a whole group.
    block_size = min(block_size, -(-max(columns, 1) // (8 * (m or 1))) * 8 * (m or 1))
    wide = _wide(weight)
    work = weight.to(wide, copy=True)
    if not all_finite(work):
        raise ValueError("weight: expected finite values, got nan or inf")
    if factor is None:
        factor = inverse_factor(hessian.to(wide), damping)
    elif not isinstance(factor, tuple | list) or len(factor) != 2:
        raise ValueError(f"factor: expected (U, damping) of inverse_factor, got {type(factor).__name__}")
    else:
        _check_factor(arguments.tensor("factor", factor[0]), hessian, weight)
    upper, used = factor[0], arguments.number("factor", factor[1])
    if not 0 <= used <= MAX_DAMPING * (1 + 1e-9):
        raise ValueError(f"factor: expected a damping of 0 to {MAX_DAMPING:g}, got {used}")
    dead = hessian.diagonal() == 0
    if dead.any():
        work[:, dead] = 0
    sweep = dispatch.implementation("column_sweep", weight.device)
    swept, packed, loss = sweep(work, upper, sparsity, keep_n, m, block_size, mask)
    if not all_finite(swept) or not all_finite(loss):
        raise ValueError(f"weight: too large: what pruning makes of it, or the loss, is beyond {wide}")
    return SweepResult(swept, packed, loss, used)


def _check_factor(upper: Tensor, hessian: Tensor, weight: Tensor) -> None:
    columns, wide = weight.shape[1], _wide(weight)
    if tuple(upper.shape) != (columns, columns) or upper.dtype != wide or upper.device != weight.device:
        raise ValueError(
            f"factor: expected {wide} ({columns}, {columns}) on {weight.device}, "
            f"got {upper.dtype} {tuple(upper.shape)} on {upper.device}"
        )
    if not all_finite(upper) or not bool((upper.diagonal() > 0).all()):
        raise ValueError("factor: expected finite values and a positive diagonal")
    if not all_finite(hessian):
        raise ValueError("hessian: expected finite values, got nan or inf")


@torch.no_grad()
def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    *,
    sparsity: float | None = None,
    keep_n: int | None = None,
    m: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Packed mask by Wanda's score |W_ij| ||X_j|| (Sun et al. 2023).

    Exactly floor(sparsity * in) entries go per row, or m - keep_n of every m; ties lowest column first.

    Args:
        weight: (out, in) floating point, finite; scores are taken in fp32 (fp64 for fp64), one that overflows is inf.
        input_norms: (in,) finite and non-negative in the scores' dtype, same device.
        sparsity: 0 <= s < 1; or keep_n of every m kept.
        mask: packed; what is pruned stays pruned and counts. A row or group that has lost more already keeps its zeros.

    Returns:
        packed uint8 (out, ceil(in/8)).

    Raises:
        ValueError: a bad argument, or non-finite values; names the argument.
    """
    sparsity, keep_n, m = _check(weight, sparsity, keep_n, m, mask)
    arguments.tensor("input_norms", input_norms)
    if tuple(input_norms.shape) != (weight.shape[1],):
        raise ValueError(f"input_norms: expected ({weight.shape[1]},), got {tuple(input_norms.shape)}")
    if input_norms.is_complex():
        raise ValueError(f"input_norms: expected real numbers, got {input_norms.dtype}")
    if input_norms.device != weight.device:
        raise ValueError(f"input_norms: expected on {weight.device} as weight, got {input_norms.device}")
    if weight.numel() == 0:
        check_values(weight, input_norms)
        return weight.new_zeros(len(weight), packed_width(weight.shape[1]), dtype=torch.uint8)
    # The implementations look at the values: on CUDA the kernel does, and the host asks once everything is queued.
    run = dispatch.implementation("wanda_mask", weight.device)
    return run(weight, input_norms, sparsity, keep_n, m, mask)


def checks_together() -> AbstractContextManager[None]:
    """Inside it :func:`wanda_mask` on CUDA returns without waiting for the device. What it would have raised for values
    that are not finite, or negative norms, is raised at the end of the block, for the first such call; until then its
    mask means nothing."""
    return sweep_on_cuda.wanda_faults.together()


def free_graphs() -> None:
    """Free the CUDA graphs that :func:`sparsegpt_prune` and :func:`inverse_factor` keep between calls, and the several
    copies of weights and Hessians that they hold. Later calls make new ones."""
    sweep_on_cuda.graphs.close()
    factor_on_cuda.graphs.close()


def _check(
    weight: Tensor, sparsity: float | None, keep_n: int | None, m: int | None, mask: Tensor | None
) -> tuple[float | None, int | None, int | None]:
    """sparsity, keep_n and m as plain numbers."""
    arguments.with_data("weight", arguments.tensor("weight", weight))
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected floating point (out, in), got {weight.dtype} {tuple(weight.shape)}")
    if (sparsity is None) == (keep_n is None) or (keep_n is None) != (m is None):
        raise ValueError(f"sparsity: give sparsity, or keep_n and m; got sparsity={sparsity}, keep_n={keep_n}, m={m}")
    if sparsity is not None:
        sparsity = arguments.number("sparsity", sparsity)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity: expected 0 <= sparsity < 1, got {sparsity}")
    if keep_n is not None:
        keep_n, m = arguments.pattern(keep_n, m, weight.shape[1])
    if mask is not None:
        check_packed(mask, weight)
    return sparsity, keep_n, m


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
