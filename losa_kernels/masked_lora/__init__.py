"""Masked-LoRA linear: y = x (M * (W + s B A))^T + bias, without keeping anything of size out x in.

The official formula forms BA, the mask and their product in every forward, recompute and backward pass; this op needs
three large products a step (Y, dX, G) and saves x and references only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losa_kernels import dispatch

MAX_RANK = 128
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def masked_lora_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x (M * (W + s B A))^T + bias (the bracket of LoSA's Eq. 1), differentiable in x, lora_A, lora_B and bias.

    With G = dY^T x:  dX = dY W_eff,  dA = s B^T (M * G),  dB = s (M * G) A^T. W is frozen. The backward pass saves x
    and references to the other arguments.

    Args:
        x: (..., in), any strides, an empty batch allowed; bf16, fp16, fp32 or fp64. Under autocast it is cast.
        weight: (out, in), floating point, not differentiated; products run in x's dtype.
        mask: packed uint8 (out, ceil(in/8)), bit b of byte j = column 8j+b, 1 = kept; None means W != 0.
        lora_A: (r, in) and lora_B: (out, r), 1 <= r <= 128, fp32 or x's dtype.
        scaling: s, finite.
        bias: (out,) or None.
        dropout_p: 0 <= p < 1, on the adapter's input only: y = x (M * W)^T + s drop(x) (M * BA)^T + bias, with a
            mask that the backward pass replays from a seed drawn from torch's default generator.

    Returns:
        (..., out) in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device or value; names the argument.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check(weight, mask, lora_A, lora_B, scaling)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected (..., {weight.shape[1]}), got {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x: expected bf16, fp16, fp32 or fp64, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x: expected on {weight.device} as weight, got {x.device}")
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if factor.dtype not in (torch.float32, x.dtype):
            raise ValueError(f"{name}: expected float32 or x's {x.dtype}, got {factor.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    seed = int(torch.randint(0, 2**31 - 1, ()).item()) if dropout_p > 0 else 0
    return _forward(x, weight, mask, lora_A, lora_B, float(scaling), bias, float(dropout_p), seed)


def merge_masked_lora(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """M * (W + s B A) in fp32 (fp64 for fp64 weights) with one rounding to the weight's dtype; (out, in), a new tensor.

    Pruned entries are exactly +0.0, whatever W holds there. Arguments and errors: see ``masked_lora_linear``.
    """
    _check(weight, mask, lora_A, lora_B, scaling)
    return dispatch.implementation("merge_masked_lora", weight.device)(weight, mask, lora_A, lora_B, float(scaling))


def _check(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    if weight.dim() != 2 or weight.dtype not in _FLOATS:
        raise ValueError(f"weight: expected floating point (out, in), got {weight.dtype} {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    rank = lora_A.shape[0] if lora_A.dim() == 2 else 0
    if not 1 <= rank <= MAX_RANK or tuple(lora_A.shape) != (rank, in_features):
        raise ValueError(f"lora_A: expected (r, {in_features}) with 1 <= r <= {MAX_RANK}, got {tuple(lora_A.shape)}")
    if tuple(lora_B.shape) != (out_features, rank):
        raise ValueError(f"lora_B: expected ({out_features}, {rank}), got {tuple(lora_B.shape)}")
    packed = (out_features, -(-in_features // 8))
    if mask is not None and (mask.dtype != torch.uint8 or tuple(mask.shape) != packed):
        raise ValueError(f"mask: expected packed uint8 {packed}, got {mask.dtype} {tuple(mask.shape)}")
    for name, tensor in (("mask", mask), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name}: expected on {weight.device} as weight, got {tensor.device}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling: expected a finite number, got {scaling}")


@torch.library.custom_op("losa::masked_lora_forward", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: int,
) -> Tensor:
    run = dispatch.implementation("masked_lora_forward", x.device)
    return run(x, weight, mask, lora_A, lora_B, scaling, bias, dropout_p, seed)


@_forward.register_fake
def _(x, weight, mask, lora_A, lora_B, scaling, bias, dropout_p, seed):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("losa::masked_lora_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: int,
    needs: list[bool],
) -> list[Tensor]:
    run = dispatch.implementation("masked_lora_backward", x.device)
    grads = run(grad_y, x, weight, mask, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return [grad for grad in grads if grad is not None]


@_backward.register_fake
def _(grad_y, x, weight, mask, lora_A, lora_B, scaling, dropout_p, seed, needs):
    like = (x, lora_A, lora_B)
    grads = [t.new_empty(t.shape) for t, needed in zip(like, needs, strict=False) if needed]
    return grads + [grad_y.new_empty(weight.shape[0])] * needs[3]


def _setup_context(ctx, inputs, output):
    x, weight, mask, lora_A, lora_B, ctx.scaling, bias, ctx.dropout_p, ctx.seed = inputs
    ctx.save_for_backward(x, weight, mask, lora_A, lora_B)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, grad_y):
    x, weight, mask, lora_A, lora_B = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4, 6)]
    grads = iter(_backward(grad_y, x, weight, mask, lora_A, lora_B, ctx.scaling, ctx.dropout_p, ctx.seed, needs))
    dx, dA, dB, dbias = (next(grads) if needed else None for needed in needs)
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, None, None, dA, dB, None, dbias, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
