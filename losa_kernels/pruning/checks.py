"""Checks that several functions of pruning share."""

from __future__ import annotations

from torch import Tensor

from losa_kernels import arguments
from losa_kernels.bitmask import check_packed


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
