"""Masked-LoRA linear in plain PyTorch: compose W_eff, then one product per result. Ground truth of the fast kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.bitmask import unpack_mask


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of W + s B A and of sums: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Bool (out, in): the packed mask, or W != 0."""
    return weight != 0 if mask is None else unpack_mask(mask, weight.shape[1])


def effective_weight(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """M * (W + s B A) in fp32 (fp64 for fp64 input), a new tensor; +0.0 wherever the mask prunes."""
    wide = accumulator(weight.dtype)
    # A factor of the product of its own would hide NaN where it is 0.
    composed = torch.addmm(weight.to(wide), lora_B.to(wide) * scaling, lora_A.to(wide))
    return composed.masked_fill_(~kept(weight, mask), 0)


def merge(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return effective_weight(weight, mask, lora_A, lora_B, scaling).to(weight.dtype)


def dropout_keep(x: Tensor, p: float, seed: int) -> Tensor:
    """The replayable dropout mask, scaled by 1/(1-p), in x's dtype."""
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return uniform.ge_(p).div_(1 - p).to(x.dtype)


def _split_weights(weight, mask, lora_A, lora_B, scaling, dtype) -> tuple[Tensor, Tensor]:
    """Base M * W and adapter M * (s B A), each rounded once to the product's dtype."""
    pruned = ~kept(weight, mask)
    wide = accumulator(weight.dtype)
    adapter = (scaling * (lora_B.to(wide) @ lora_A.to(wide))).masked_fill_(pruned, 0).to(dtype)
    return weight.masked_fill(pruned, 0).to(dtype), adapter


def _wide_product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left right in ``wide``: G may exceed what fp16 holds."""
    if left.device.type == "cuda" and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def forward(
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
    """y (..., out) in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if dropout_p > 0:
        base, adapter = _split_weights(weight, mask, lora_A, lora_B, scaling, x.dtype)
        y = rows @ base.T + (rows * dropout_keep(rows, dropout_p, seed)) @ adapter.T
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        composed = effective_weight(weight, mask, lora_A, lora_B, scaling).to(x.dtype)
        y = torch.nn.functional.linear(rows, composed, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: int,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_A and lora_B in their dtypes, and of bias in ``accumulator(weight.dtype)``; ``needs`` says
    which, the others are None.

    dX = dY W_eff;  with G = dY^T x:  dA = s B^T (M * G),  dB = s (M * G) A^T. ``x`` may be None if neither lora_A nor
    lora_B needs a gradient; ``seed`` is the forward's.
    """
    needs_x, needs_A, needs_B, needs_bias = needs
    (out_features, in_features), wide, dtype = weight.shape, accumulator(weight.dtype), grad_y.dtype
    dy = grad_y.reshape(-1, out_features)
    keep = dropout_keep(dy.new_empty(dy.shape[0], in_features), dropout_p, seed) if dropout_p > 0 else None
    dx = dA = dB = dbias = None
    if needs_x:
        if keep is None:
            dx = dy @ effective_weight(weight, mask, lora_A, lora_B, scaling).to(dtype)
        else:
            base, adapter = _split_weights(weight, mask, lora_A, lora_B, scaling, dtype)
            dx = dy @ base + (dy @ adapter) * keep
        dx = dx.reshape(*grad_y.shape[:-1], in_features)
    if needs_A or needs_B:
        rows = x.reshape(-1, in_features)
        projected = _wide_product(dy.T, rows if keep is None else rows * keep, wide)
        projected.masked_fill_(~kept(weight, mask), 0)
        if needs_A:
            dA = (scaling * (lora_B.to(wide).T @ projected)).to(lora_A.dtype)
        if needs_B:
            dB = (scaling * (projected @ lora_A.to(wide).T)).to(lora_B.dtype)
    if needs_bias:
        dbias = dy.sum(0, dtype=wide)
    return dx, dA, dB, dbias
