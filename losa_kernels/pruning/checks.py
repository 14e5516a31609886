"""Checks that several functions of pruning share."""

from __future__ import annotations

from torch import Tensor

from losa_kernels import arguments
from losa_kernels.bitmask import check_packed
from losa_kernels.pruning.reference import MAX_DAMPING
from losa_kernels.tensors import all_finite, wide_dtype


def check_problem(
    weight: Tensor, sparsity: float | None, keep_n: int | None, m: int | None, mask: Tensor | None
) -> tuple[float | None, int | None, int | None]:
    """What every way of pruning takes: sparsity, or keep_n and m, as plain numbers.

    Raises:
        ValueError: a bad argument; names it.
    """
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


def check_hessian_of(weight: Tensor, hessian: Tensor) -> None:
    """ValueError unless ``hessian`` can be that of the weight's inputs; its values are not looked at."""
    columns = weight.shape[1]
    arguments.tensor("hessian", hessian)
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(f"hessian: expected ({columns}, {columns}), got {tuple(hessian.shape)}")
    if not hessian.is_floating_point():
        raise ValueError(f"hessian: expected floating point, got {hessian.dtype}")
    if hessian.device != weight.device:
        raise ValueError(f"hessian: expected on {weight.device} as weight, got {hessian.device}")


def check_used_damping(name: str, damping: float) -> float:
    """The damping that a shared factor says it needed; ValueError names the factor's argument."""
    damping = arguments.number(name, damping)
    if not 0 <= damping <= MAX_DAMPING * (1 + 1e-9):
        raise ValueError(f"{name}: expected a damping of 0 to {MAX_DAMPING:g}, got {damping}")
    return damping


def check_hessian(hessian: Tensor) -> Tensor:
    """In the dtype that it is factored in."""
    arguments.with_data("hessian", arguments.tensor("hessian", hessian))
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.is_floating_point():
        raise ValueError(f"hessian: expected floating point (in, in), got {hessian.dtype} {tuple(hessian.shape)}")
    hessian = hessian.to(wide_dtype(hessian.dtype))
    if not all_finite(hessian):
        raise ValueError(f"hessian: expected finite values in {hessian.dtype}, got nan or inf")
    return hessian


def check_damping(damping: float) -> float:
    damping = arguments.number("damping", damping)
    if not 0 < damping <= MAX_DAMPING:
        raise ValueError(f"damping: expected 0 < damping <= {MAX_DAMPING:g}, got {damping}")
    return damping
