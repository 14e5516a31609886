"""Linear layers on dense weights, for inference: output layers, and models that are not packed."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that torch multiplies


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, as ``torch.nn.functional.linear``, which takes all but few rows of x on a CPU.

    Products and sums of these few rows are fp32, rounded once; numbers below the smallest normal fp32 number may count
    as zero. Where x is NaN or inf, the outputs of its row are not finite; which of the two is not defined.

    Args:
        x: (..., in) bf16, fp16, fp32 or fp64.
        weight: (out, in) of x's dtype and device.
        bias: (out,) of x's dtype and device, or None.

    Returns:
        (..., out) in x's dtype. There is no backward pass: the result never requires a gradient.

    Raises:
        ValueError: a wrong shape, dtype or device; names the argument.
        RuntimeError: an argument requires a gradient and gradients are enabled.
    """
    arguments.tensor("x", x)
    arguments.tensor("weight", weight)
    if bias is not None:
        arguments.tensor("bias", bias)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (out, in), got {tuple(weight.shape)}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"weight: expected bf16, fp16, fp32 or fp64, got {weight.dtype}")
    out_features, in_features = weight.shape
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected (..., {in_features}), got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias: expected ({out_features},), got {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise ValueError(f"{name}: expected {weight.dtype} as weight, got {tensor.dtype}")
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as weight, got {tensor.device}")
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                reason = "requires a gradient, but dense_linear is for inference only; call it under torch.no_grad()"
                raise RuntimeError(f"{name}: {reason}")
    return dispatch.implementation("dense_linear", weight.device)(x, weight, bias)
