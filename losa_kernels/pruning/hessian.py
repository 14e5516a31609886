"""The Hessian X^T X of a linear's inputs: summed over batches, completed, and factored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.pruning.checks import check_damping, check_hessian
from losa_kernels.pruning.reference import SingularHessianError

PANEL = 256  # columns that are multiplied at once; all work below the diagonal is inside such blocks
TENSOR_CORE_PANEL = 2048  # wide enough to keep tensor cores busy
# Each lets a product of 16-bit inputs add up in 16 bits.
REDUCED = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@torch.no_grad()
def accumulate_hessian(hessian: Tensor, x: Tensor) -> None:
    """hessian += x^T x on and above the diagonal, in place; ``complete_hessian`` makes it whole at the end.

    That is little more than half the work of a full product.

    An fp32 Hessian of 16-bit inputs on CUDA comes from tensor cores: each product of two inputs is exact, and sums are
    fp32.

    Args:
        hessian: (in, in) fp32 or fp64.
        x: (tokens, in), any floating dtype, same device; multiplied in the Hessian's dtype. What is not finite makes
            the Hessian not finite, which ``inverse_factor`` and ``sparsegpt_prune`` refuse.

    Raises:
        ValueError: a wrong shape, dtype or device; names the argument.
    """
    _check_sum(hessian)
    arguments.tensor("x", x)
    if x.dim() != 2 or x.shape[1] != len(hessian) or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (tokens, {len(hessian)}), got {x.dtype} {tuple(x.shape)}")
    if x.device != hessian.device:
        raise ValueError(f"x: expected on {hessian.device} as hessian, got {x.device}")
    if _on_tensor_cores(hessian, x):
        with full_accumulation():
            for start in range(0, x.shape[1], TENSOR_CORE_PANEL):
                product = _product(x[:, start : start + TENSOR_CORE_PANEL].T, x[:, start:])
                hessian[start : start + TENSOR_CORE_PANEL, start:].add_(product)
        return
    x = x.to(hessian.dtype)
    for start in range(0, x.shape[1], PANEL):
        hessian[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])


def _on_tensor_cores(hessian: Tensor, x: Tensor) -> bool:
    sixteen = x.dtype in (torch.bfloat16, torch.float16)
    return x.device.type == "cuda" and sixteen and hessian.dtype == torch.float32 and len(x) > 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """fp32 a b of 16-bit matrices."""
    return torch.mm(a, b, out_dtype=torch.float32)


@contextmanager
def full_accumulation() -> Iterator[None]:
    """16-bit products on CUDA add up in fp32 inside the block, whatever torch's settings say."""
    settings = torch.backends.cuda.matmul
    before = {name: getattr(settings, name) for name in REDUCED}
    changed = [name for name, value in before.items() if value]
    for name in changed:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name in changed:
            setattr(settings, name, before[name])


@torch.no_grad()
def complete_hessian(hessian: Tensor) -> Tensor:
    """Copy what is above the diagonal blocks below them, in place; returns ``hessian``, exactly symmetric.

    Raises:
        ValueError: not (in, in) fp32 or fp64.
    """
    _check_sum(hessian)
    for start in range(0, len(hessian), PANEL):
        end = min(start + PANEL, len(hessian))
        hessian[end:, start:end] = hessian[start:end, end:].T
        block = hessian[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).T)
    return hessian


def _check_sum(hessian: Tensor) -> None:
    arguments.written_to("hessian", arguments.tensor("hessian", hessian))
    square = hessian.dim() == 2 and hessian.shape[0] == hessian.shape[1]
    if not square or hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"hessian: expected float32 or float64 (in, in), got {hessian.dtype} {tuple(hessian.shape)}")


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
    hessian, damping = check_hessian(hessian), check_damping(damping)
    (found,) = dispatch.implementation("inverse_factors", hessian.device)([hessian], damping)
    if isinstance(found, SingularHessianError):
        raise found
    return found


@torch.no_grad()
def inverse_factors(hessians: Sequence[Tensor], damping: float) -> list[tuple[Tensor, float] | SingularHessianError]:
    """``inverse_factor`` of each Hessian, or its SingularHessianError.

    Each Hessian has a damping of its own. On CUDA several are factored at a time.

    Raises:
        ValueError: a wrong shape, device or damping, or a non-finite Hessian; names the argument.
    """
    damping, hessians = check_damping(damping), [check_hessian(hessian) for hessian in hessians]
    if not hessians:
        return []
    devices = {hessian.device for hessian in hessians}
    if len(devices) > 1:
        raise ValueError(f"hessian: expected all on one device, got {', '.join(sorted(map(str, devices)))}")
    return dispatch.implementation("inverse_factors", hessians[0].device)(hessians, damping)
