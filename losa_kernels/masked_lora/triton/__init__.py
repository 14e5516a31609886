"""Masked-LoRA linear on a GPU by Triton; kernels.py and projection.py have the kernels and their reasons.

There are two ways, and tuning.py chooses at every call (``LOSA_MASKED_LORA`` forces one). *Fused*: W_eff is formed in
registers, and nothing of its size is in memory. *Composed*: one kernel writes W_eff, which lives as long as the call,
and the vendor's GEMM does the product. The gradients of A and B likewise: G stays in accumulators, or comes in slices
from the vendor's GEMM, for bf16 layers in bf16 as any weight's gradient does in torch, else in fp32. With dropout
composing takes two matrices, M * W and M * (s B A), two products and a dropped copy of x.

The dropout mask is a function of (seed, row, column) of its own (``drop_kernel``), not the stream that the reference
and the CPU draw from torch's generator: a GPU replays a GPU's result, which is not the CPU's bit for bit. The
share dropped is p to 2^-16.

fp64 goes to the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from losa_kernels.masked_lora import reference
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.masked_lora.triton import tuning
from losa_kernels.masked_lora.triton.launch import compose, draw, drop_scale, inner_size, keep, linear, project


def forward(x: Tensor, layer: Layer, bias: Tensor | None, dropout_p: float, seed: int) -> Tensor:
    """y (..., out) in x's dtype: x (M * (W + s B A))^T + bias, W_eff rounded once to x's dtype before the product.

    With dropout_p > 0: y = x (M * W)^T + s drop(x) (M * BA)^T + bias.
    """
    if _exceeds_fp32(x, layer):
        return reference.forward(x, layer, bias, dropout_p, seed)
    rows, layer = x.reshape(-1, x.shape[-1]), _with_unit_columns(layer)
    out_features = layer.weight.shape[0]
    with torch.cuda.device_of(x):
        drop = draw(rows.shape[0], rows.shape[1], dropout_p, seed, x.device)
        if rows.shape[0] == 0:
            y = x.new_empty(0, out_features)
        else:

            def fused() -> Tensor:
                narrow = None if bias is None else bias.contiguous()
                return linear(rows, layer, narrow, drop, dropout_p, transposed=False)

            def composed() -> Tensor:
                narrow = None if bias is None else bias.to(x.dtype)
                base, adapter = compose(_kept_share(layer, dropout_p), x.dtype, apart=drop is not None)
                y = F.linear(rows, base, narrow)
                return y if adapter is None or drop is None else y.addmm_(keep(rows, drop), adapter.T)

            y = _by_way("forward", rows, layer, drop, fused, composed)
    return y.view(*x.shape[:-1], out_features)


def backward(
    grad_y: Tensor, x: Tensor | None, layer: Layer, dropout_p: float, seed: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_A and lora_B in their dtypes, and of bias in fp32; ``needs`` says which.

    dX = dY W_eff;  with G = dY^T x:  dA = s B^T (M * G), dB = s (M * G) A^T. ``seed``: the forward's. ``x`` may be None
    if neither lora_A nor lora_B needs a gradient.
    """
    if _exceeds_fp32(grad_y, layer):
        return reference.backward(grad_y, x, layer, dropout_p, seed, needs)
    needs_x, needs_A, needs_B, needs_bias = needs
    (out_features, in_features), dtype = layer.weight.shape, grad_y.dtype
    dy, layer = grad_y.reshape(-1, out_features), _with_unit_columns(layer)
    dx = dA = dB = None
    with torch.cuda.device_of(grad_y):
        drop = None
        if needs_x or needs_A or needs_B:
            drop = draw(dy.shape[0], in_features, dropout_p, seed, dy.device)
        if needs_x:
            if dy.shape[0] == 0:
                dx = dy.new_empty(0, in_features)
            else:

                def fused() -> Tensor:
                    return linear(dy, layer, None, drop, dropout_p, transposed=True)

                def composed() -> Tensor:
                    base, adapter = compose(_kept_share(layer, dropout_p), dtype, apart=drop is not None)
                    if adapter is None or drop is None:
                        return dy @ base
                    through_adapter = dy @ adapter
                    return keep(through_adapter, drop, out=through_adapter).addmm_(dy, base)

                dx = _by_way("gradient of x", dy, layer, drop, fused, composed)
            dx = dx.view(*grad_y.shape[:-1], in_features)
        if needs_A or needs_B:
            assert x is not None
            rows = x.reshape(-1, in_features)
            dA, dB = project(dy, rows, _kept_share(layer, dropout_p), drop, needs_A, needs_B)
    dbias = dy.sum(0, dtype=torch.float32) if needs_bias else None
    return dx, dA, dB, dbias


def merge(layer: Layer) -> Tensor:
    """M * (W + s B A) in fp32, one rounding to the weight's dtype, +0.0 where pruned; (out, in), a new tensor."""
    if _exceeds_fp32(layer.weight, layer):
        return reference.merge(layer)
    with torch.cuda.device_of(layer.weight):
        # The factors as one fp32 term: a checkpoint is written once, so speed does not matter.
        return compose(_with_unit_columns(layer), layer.weight.dtype, terms_dtype=torch.float32)[0]


def _by_way(
    op: str,
    rows: Tensor,
    layer: Layer,
    drop: Tensor | None,
    fused: Callable[[], Tensor],
    composed: Callable[[], Tensor],
) -> Tensor:
    """The product of ``rows`` by the faster way, the same for all token counts up to the next power of two."""
    tokens, (out_features, in_features), dtype = rows.shape[0], layer.weight.shape, rows.dtype
    inner, arch = inner_size(layer, dtype), tuning.architecture(rows.device)
    transposed, dropout = op == "gradient of x", drop is not None
    predicted = tuning.fused(tokens, out_features, in_features, inner, arch, transposed, dropout)
    words = tuning.words(mask=layer.mask is not None, dropout=dropout)
    key = (tuning.next_power_of_2(tokens), out_features, in_features, inner, dtype, layer.weight.dtype, *words)
    return tuning.by_way(op, key, dtype == torch.float32, rows.device, predicted, fused, composed)


def _exceeds_fp32(x: Tensor, layer: Layer) -> bool:
    return torch.float64 in (x.dtype, layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype)


def _kept_share(layer: Layer, dropout_p: float) -> Layer:
    """The layer whose adapter makes up for what dropout takes from its input."""
    return layer if dropout_p == 0 else layer._replace(scaling=layer.scaling * drop_scale(dropout_p))


def _with_unit_columns(layer: Layer) -> Layer:
    """The layer with a mask whose bytes of a row lie side by side, as the kernels read them."""
    mask = layer.mask
    return layer if mask is None or mask.stride(1) == 1 else layer._replace(mask=mask.contiguous())
