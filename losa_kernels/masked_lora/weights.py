"""A masked linear whose kept weights are trained, by the products of the masked-LoRA linear."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losa_kernels.bitmask import unpack_mask
from losa_kernels.masked_lora import merge_masked_lora
from losa_kernels.masked_lora.calls import autocast_input, run
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.native import product_dtype


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, change: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (M * (W + D))^T + bias, differentiable in x, D and bias: dX = dY W_eff, dD = M * (dY^T x).

    W + D is formed for the forward and for the backward pass alone: kept, it would take the memory of a second model.
    No second derivatives.

    Args:
        x: (..., in), bf16, fp16, fp32 or fp64; under autocast it is cast to the autocast dtype.
        weight: W (out, in), any floating point; never differentiated.
        mask: packed uint8 (out, ceil(in/8)), 1 = kept.
        change: D (out, in), fp32 (fp64 beside fp64): the sum W + D has its precision, and is rounded once to x's.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    return _MaskedLinear.apply(autocast_input(x), weight, mask, change, bias)


def merge_masked(weight: Tensor, mask: Tensor, change: Tensor) -> Tensor:
    """M * (W + D) with one rounding to the weight's dtype: (out, in), a new tensor, exactly +0.0 where pruned."""
    return merge_masked_lora(*_layer(weight, mask, change)).to(weight.dtype)


def _layer(weight: Tensor, mask: Tensor, change: Tensor) -> Layer:
    """W + D as a layer without an adapter."""
    outputs, inputs = weight.shape
    return Layer(weight + change, mask, change.new_zeros(1, inputs), change.new_zeros(outputs, 1), 0.0)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, mask: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
        ctx.needs = [ctx.needs_input_grad[0], False, False, ctx.needs_input_grad[4]]
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, mask, change)
        y = run("masked_lora_forward", x.device, x, _layer(weight, mask, change), bias, 0.0, 0)
        # Autograd forbids changing in place what a Function returns as a view.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        x, weight, mask, change = ctx.saved_tensors
        dx = d_change = d_bias = None
        if any(ctx.needs):
            layer = _layer(weight, mask, change)
            dx, _, _, d_bias = run("masked_lora_backward", grad_y.device, grad_y, None, layer, 0.0, 0, ctx.needs)
        if ctx.needs_input_grad[3]:
            dtype = product_dtype(x.dtype) if x.device.type == "cpu" else x.dtype
            product = grad_y.flatten(0, -2).T.to(dtype) @ x.flatten(0, -2).to(dtype)
            d_change = product.to(change.dtype).mul_(unpack_mask(mask, weight.shape[1]))
        return dx, None, None, d_change, d_bias
