"""Masked-LoRA linear on a CPU: sparse products where they pay (cpu_sparse.py); else torch's dense ones, in panels that
csrc/cpu/masked_lora/panels.cpp composes and projects.

Without dropout a dense training step is three products of 2 T out in FLOPs (Y, dX and G); all else is one pass over
panels of W or G. They stay in cache and in kept memory: a fresh temporary of 64 MB costs as much in page faults as a
tenth of the product it serves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from losa_kernels.masked_lora import cpu_sparse, reference
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.masked_lora.reference import dropout_keep
from losa_kernels.native import product_dtype
from losa_kernels.scratch import scratch

PANEL = 1 << 21  # elements of W_eff or G that exist at a time


def forward(x: Tensor, layer: Layer, bias: Tensor | None, dropout_p: float, seed: int) -> Tensor:
    """y (..., out) in x's dtype: x (M * (W + s B A))^T + bias, W_eff rounded once to x's dtype before the product.

    With dropout_p > 0: y = x (M * W)^T + drop(x) (M * s B A)^T + bias. fp64: the reference.
    """
    weight, mask = layer.weight, layer.mask
    if weight.dtype == torch.float64:
        return reference.forward(x, layer, bias, dropout_p, seed)
    rows = x.reshape(-1, x.shape[-1]).to(product_dtype(x.dtype))
    bias = None if bias is None else bias.to(rows.dtype)
    A, sB = layer.lora_A.float(), layer.scaled_B(torch.float32)
    dropped = rows * dropout_keep(rows, dropout_p, seed) if dropout_p > 0 else None
    y = x.new_empty(rows.shape[0], weight.shape[0])
    fits = dropped is None and weight.dtype == x.dtype
    if fits and mask is not None and _sparse(x.dtype, len(rows), mask, weight):
        cpu_sparse.multiply(rows, [len(rows)], [weight], [mask], [A], [sB], [] if bias is None else [bias], y)
        return y.view(*x.shape[:-1], weight.shape[0])
    for part in _slices(weight):
        W, start = weight[part], None if bias is None else bias[part]
        bits = None if mask is None else mask[part]
        if dropped is None:
            panel = _composed(W, bits, A, sB[part], x)
        else:
            adapter = _composed(W, bits, A, sB[part], x, base=False)
            start = dropped @ adapter.T if start is None else torch.addmm(start, dropped, adapter.T)
            panel = _composed(W, bits, None, None, x)
        _product(rows, panel.T, y[:, part], start)
    return y.view(*x.shape[:-1], weight.shape[0])


def backward(
    grad_y: Tensor, x: Tensor | None, layer: Layer, dropout_p: float, seed: int, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, lora_A and lora_B in their dtypes, and of bias in fp32. fp64: the reference.

    ``needs`` says which of the four; the remaining ones are None. dX = dY W_eff;  with G = dY^T x:  dA = s B^T (M * G),
    dB = s (M * G) A^T. ``seed``: the forward's. ``x`` may be None if neither lora_A nor lora_B needs a gradient.
    """
    weight, mask = layer.weight, layer.mask
    if weight.dtype == torch.float64:
        return reference.backward(grad_y, x, layer, dropout_p, seed, needs)
    needs_x, needs_A, needs_B, needs_bias = needs
    out_features, in_features = weight.shape
    dy = grad_y.reshape(-1, out_features)
    dbias = dy.sum(0, dtype=torch.float32) if needs_bias else None
    if not (needs_x or needs_A or needs_B):
        return None, None, None, dbias

    dy = dy.to(product_dtype(grad_y.dtype))
    rows = None
    if needs_A or needs_B:
        assert x is not None
        rows = x.reshape(-1, in_features).to(dy.dtype)
    keep_x = None
    if dropout_p > 0:
        keep_x = dropout_keep(dy.new_empty(dy.shape[0], in_features), dropout_p, seed)
        rows = None if rows is None else rows * keep_x
    A, sB = layer.lora_A.float(), layer.scaled_B(torch.float32)
    dx = dense_dx = grad_y.new_empty(dy.shape[0], in_features) if needs_x else None
    dA = A.new_zeros(A.shape) if needs_A else None
    dB = A.new_zeros(sB.shape) if needs_B else None
    if mask is not None and _sparse(dy.dtype, len(dy), mask, weight):
        # W_eff rounded to a lower precision, and dropout on one of its terms, are left to the dense product.
        sparse_dx = dx if keep_x is None and weight.dtype == dy.dtype == grad_y.dtype else None
        factors = [[] if gradient is None else [gradient] for gradient in (dA, dB)]
        cpu_sparse.backward(dy, rows, [len(dy)], [weight], [mask], [A], [sB], sparse_dx, *factors)
        dense_dx, rows = dx if sparse_dx is None else None, None
    # Panels of columns: each gives its columns of dX and dA at once, so only the small dB is accumulated.
    for part in _slices(weight, dim=1) if dense_dx is not None or rows is not None else ():
        W = weight[:, part]
        bits = None if mask is None else mask[:, part.start // 8 : -(-part.stop // 8)]
        if dense_dx is not None and keep_x is None:
            _product(dy, _composed(W, bits, A[:, part], sB, grad_y), dense_dx[:, part])
        elif dense_dx is not None and keep_x is not None:
            through_adapter = dy @ _composed(W, bits, A[:, part], sB, grad_y, base=False)
            base = _composed(W, bits, None, None, grad_y)
            _product(dy, base, dense_dx[:, part], through_adapter.mul_(keep_x[:, part]))
        if rows is not None:
            G = torch.mm(dy.T, rows[:, part], out=scratch("gradient", tuple(W.shape), dy.dtype))
            torch.ops.losa.project_masked_lora.default(
                G, W, bits, A[:, part], sB, None if dA is None else dA[:, part], dB
            )
    return (
        None if dx is None else dx.view(*grad_y.shape[:-1], in_features),
        None if dA is None else dA.to(layer.lora_A.dtype),
        None if dB is None else dB.mul_(layer.scaling).to(layer.lora_B.dtype),
        dbias,
    )


def merge(layer: Layer) -> Tensor:
    """M * (W + s B A), (out, in) in the weight's dtype, one rounding; +0.0 at pruned places. fp64: the reference."""
    weight = layer.weight
    if weight.dtype == torch.float64:
        return reference.merge(layer)
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    A, sB = layer.lora_A.float(), layer.scaled_B(torch.float32)
    torch.ops.losa.compose_masked_lora.default(weight, layer.mask, True, A, sB, merged)
    return merged


def _sparse(product: torch.dtype, tokens: int, mask: Tensor, weight: Tensor) -> bool:
    return cpu_sparse.pays(product, tokens, weight.shape[1], [mask], cpu_sparse.FEWEST_TOKENS)


def _composed(
    W: Tensor, mask: Tensor | None, A: Tensor | None, sB: Tensor | None, x: Tensor, *, base: bool = True
) -> Tensor:
    """A panel M * (W + sB A), or one of its two summands, in kept memory.

    It is rounded to x's dtype and then widened to the dtype of x's product.
    """
    shape, product = tuple(W.shape), product_dtype(x.dtype)
    panel = scratch("panel", shape, x.dtype)
    torch.ops.losa.compose_masked_lora.default(W, mask, base, A, sB, panel)
    return panel if product == x.dtype else scratch("widened panel", shape, product).copy_(panel)


def _product(left: Tensor, right: Tensor, out: Tensor, start: Tensor | None = None) -> None:
    """out = left right (+ start), with one rounding to out's dtype."""
    if out.dtype != left.dtype:
        out.copy_(left @ right if start is None else torch.addmm(start, left, right))
    elif start is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(start, left, right, out=out)


def _slices(matrix: Tensor, dim: int = 0) -> Iterator[slice]:
    """Slices of ``dim`` that cover the matrix, each with about ``PANEL`` elements."""
    size, across = matrix.shape[dim], matrix.shape[1 - dim]
    # Multiples of 64: a panel of columns starts at a whole byte of the mask, and no product gets narrower than that.
    step = max(64, PANEL // max(1, across) // 64 * 64)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
