"""Linear layers on packed weights, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch
from losa_kernels.packing import Packed, Packed24, PackedBitmask, PackedNM

WITH_KERNELS = (Packed24, PackedBitmask, PackedNM)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that torch multiplies


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias with W in a packed format.

    A NaN or inf of x makes each output not finite (NaN or inf, which of the two is not defined) that a stored weight
    connects it to; whether it also passes through pruned weights (0 * NaN) is not defined. One of W or bias does so to
    its output feature only.

    Args:
        x: (..., in) bf16, fp16, fp32 or fp64 on the packed weight's device; the product runs in its dtype.
        packed: what ``pack_bitmask``, ``pack_nm`` or ``pack_24`` returned; or a weight of another class of ``Packed``,
            which is multiplied by its own ``linear``.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype. There is no backward pass: the result never requires a gradient.

    Raises:
        ValueError: a wrong shape or device; names the argument.
        RuntimeError: x or bias requires a gradient and gradients are enabled.
    """
    if not isinstance(packed, Packed):
        raise ValueError(f"packed: expected a packed weight, got {type(packed).__name__}")
    arguments.tensor("x", x)
    if bias is not None:
        arguments.tensor("bias", bias)
    out_features, in_features = packed.shape
    device = x.device
    if x.dim() < 1 or x.shape[-1] != in_features or not x.is_floating_point():
        raise ValueError(f"x: expected floating point (..., {in_features}), got {x.dtype} {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x: expected bf16, fp16, fp32 or fp64, got {x.dtype}")
    if device != packed.values.device:
        raise ValueError(f"x: expected on {packed.device} as packed, got {device}")
    if bias is not None:
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias: expected ({out_features},), got {tuple(bias.shape)}")
        if not bias.is_floating_point():
            raise ValueError(f"bias: expected floating point, got {bias.dtype}")
        if bias.device != device:
            raise ValueError(f"bias: expected on {device} as x, got {bias.device}")
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                reason = "requires a gradient, but sparse_linear is for inference only; call it under torch.no_grad()"
                raise RuntimeError(f"{name}: {reason}")
    if type(packed) not in WITH_KERNELS:
        return packed.linear(x, bias)
    return dispatch.implementation("sparse_linear", device)(x, packed, bias)
