"""Masked-LoRA linear in plain PyTorch: compose W_eff, then one product per result. Ground truth of the fast kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.bitmask import unpack_mask
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.tensors import wide_dtype


def kept(layer: Layer) -> Tensor:
    """Bool (out, in): the packed mask, or W != 0."""
    return layer.weight != 0 if layer.mask is None else unpack_mask(layer.mask, layer.weight.shape[1])


def effective_weight(layer: Layer) -> Tensor:
    """M * (W + s B A) in fp32 (fp64 for fp64 input), a new tensor; +0.0 wherever the mask prunes."""
    wide = wide_dtype(layer.weight.dtype)
    # B is scaled before the product: scaling the product would hide its NaN where the scaling is 0.
    composed = torch.addmm(layer.weight.to(wide), layer.scaled_B(wide), layer.lora_A.to(wide))
    return composed.masked_fill_(~kept(layer), 0)


def merge(layer: Layer) -> Tensor:
    return effective_weight(layer).to(layer.weight.dtype)


def dropout_keep(x: Tensor, p: float, seed: int) -> Tensor:
    """The replayable dropout mask, scaled by 1/(1-p), in x's dtype."""
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return uniform.ge_(p).div_(1 - p).to(x.dtype)


def _split_weights(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Base M * W and adapter M * (s B A), each rounded once to the product's dtype."""
    pruned, wide = ~kept(layer), wide_dtype(layer.weight.dtype)
    product = layer.lora_B.to(wide) @ layer.lora_A.to(wide)
    adapter = (layer.scaling * product).masked_fill_(pruned, 0).to(dtype)
    return layer.weight.masked_fill(pruned, 0).to(dtype), adapter


def _wide_product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left right in ``wide``: G may exceed what fp16 holds."""
    if left.device.type == "cuda" and left.dtype != wide:
        return torch.mm(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)


def forward(x: Tensor, layer: Layer, bias: Tensor | None, dropout_p: float, seed: int) -> Tensor:
    """y (..., out) in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if dropout_p > 0:
        base, adapter = _split_weights(layer, x.dtype)
        y = rows @ base.T + (rows * dropout_keep(rows, dropout_p, seed)) @ adapter.T
        y = y if bias is None else y + bias.to(x.dtype)
    else:
        composed = effective_weight(layer).to(x.dtype)
        y = torch.nn.functional.linear(rows, composed, None if bias is None else bias.to(x.dtype))
    return y.reshape(*x.shape[:-1], layer.weight.shape[0])


def backward(
    grad_y: Tensor, x: Tensor | None, layer: Layer, dropout_p: float, seed: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_A and lora_B in their dtypes, and of bias in ``wide_dtype(layer.weight.dtype)``.

    ``needs`` says which of the four are wanted; the remaining ones are None.

    dX = dY W_eff;  with G = dY^T x:  dA = s B^T (M * G),  dB = s (M * G) A^T. ``x`` may be None if neither lora_A nor
    lora_B needs a gradient; ``seed`` is the forward's.
    """
    needs_x, needs_A, needs_B, needs_bias = needs
    (out_features, in_features), dtype = layer.weight.shape, grad_y.dtype
    wide = wide_dtype(layer.weight.dtype)
    dy = grad_y.reshape(-1, out_features)
    keep = dropout_keep(dy.new_empty(dy.shape[0], in_features), dropout_p, seed) if dropout_p > 0 else None
    dx = dA = dB = dbias = None
    if needs_x:
        if keep is None:
            dx = dy @ effective_weight(layer).to(dtype)
        else:
            base, adapter = _split_weights(layer, dtype)
            dx = dy @ base + (dy @ adapter) * keep
        dx = dx.reshape(*grad_y.shape[:-1], in_features)
    if needs_A or needs_B:
        assert x is not None
        rows = x.reshape(-1, in_features)
        projected = _wide_product(dy.T, rows if keep is None else rows * keep, wide)
        projected.masked_fill_(~kept(layer), 0)
        if needs_A:
            dA = (layer.scaling * (layer.lora_B.to(wide).T @ projected)).to(layer.lora_A.dtype)
        if needs_B:
            dB = (layer.scaling * (projected @ layer.lora_A.to(wide).T)).to(layer.lora_B.dtype)
    if needs_bias:
        dbias = dy.sum(0, dtype=wide)
    return dx, dA, dB, dbias
