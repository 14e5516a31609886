"""Masked-LoRA linear on a GPU by Triton; the kernels and their reasons are in triton_kernels.py and triton_project.py.

Two ways, chosen per call by tuning.py (``LOSA_MASKED_LORA`` = ``auto`` | ``fused`` | ``compose``): *fused*, W_eff
formed in registers and nothing of its size in memory; or *composed*, one kernel writes W_eff into a scratch that all
layers of a device share, and the vendor's GEMM does the product. The gradients of A and B likewise: G stays in
accumulators, or comes in slices from the vendor's GEMM, for bf16 layers in bf16 as any weight's gradient does in torch,
else in fp32. With dropout everything is fused, since composing would take a dropped copy of x and a second W_eff.

The dropout mask is a function of (seed, row, column) of its own (``drop_kernel``), not the stream that the reference
and the CPU draw from torch's generator: a GPU result is replayed by the GPU, not compared with theirs bit for bit. The
share dropped is p to 2^-16.

fp64 goes to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from losa_kernels.masked_lora import reference, tuning
from losa_kernels.masked_lora.triton_launch import compose, draw, drop_scale, factor_depth, linear, project, split


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
    """y (..., out) in x's dtype: x (M * (W + s B A))^T + bias, W_eff rounded once to x's dtype before the product.

    With dropout_p > 0: y = x (M * W)^T + s drop(x) (M * BA)^T + bias.
    """
    if _exceeds_fp32(x, weight, lora_A, lora_B):
        return reference.forward(x, weight, mask, lora_A, lora_B, scaling, bias, dropout_p, seed)
    rows, mask = x.reshape(-1, x.shape[-1]), _unit_columns(mask)
    with torch.cuda.device_of(x):
        drop = draw(rows.shape[0], rows.shape[1], dropout_p, seed, x.device)
        if rows.shape[0] == 0:
            y = x.new_empty(0, weight.shape[0])
        elif drop is None and not _fused(rows, weight, lora_A, lora_B, transposed=False):
            composed = compose(weight, mask, lora_A, lora_B, scaling, _scratch(weight, x.dtype))
            y = F.linear(rows, composed, None if bias is None else bias.to(x.dtype))
        else:
            factors = split(lora_A, lora_B, x.dtype)
            y = linear(rows, weight, mask, factors, scaling, _contiguous(bias), drop, dropout_p, transposed=False)
    return y.view(*x.shape[:-1], weight.shape[0])


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
    """Gradients of x, lora_A and lora_B in their dtypes, and of bias in fp32; ``needs`` says which, others are None.

    dX = dY W_eff;  with G = dY^T x:  dA = s B^T (M * G), dB = s (M * G) A^T. ``seed``: the forward's. ``x`` may be None
    if neither lora_A nor lora_B needs a gradient.
    """
    if _exceeds_fp32(grad_y, weight, lora_A, lora_B):
        return reference.backward(grad_y, x, weight, mask, lora_A, lora_B, scaling, dropout_p, seed, needs)
    needs_x, needs_A, needs_B, needs_bias = needs
    (out_features, in_features), dtype = weight.shape, grad_y.dtype
    dy, mask = grad_y.reshape(-1, out_features), _unit_columns(mask)
    dx = dA = dB = None
    with torch.cuda.device_of(grad_y):
        drop = None
        if needs_x or needs_A or needs_B:
            drop = draw(dy.shape[0], in_features, dropout_p, seed, dy.device)
        if needs_x:
            if dy.shape[0] == 0:
                dx = dy.new_empty(0, in_features)
            elif drop is None and not _fused(dy, weight, lora_A, lora_B, transposed=True):
                dx = dy @ compose(weight, mask, lora_A, lora_B, scaling, _scratch(weight, dtype))
            else:
                A_terms, B_terms = split(lora_A, lora_B, dtype)
                factors = (B_terms, A_terms)
                dx = linear(dy, weight.T, mask, factors, scaling, None, drop, dropout_p, transposed=True)
            dx = dx.view(*grad_y.shape[:-1], in_features)
        if needs_A or needs_B:
            rows = x.reshape(-1, in_features)
            factor = scaling * drop_scale(dropout_p)
            dA, dB = project(dy, rows, weight, mask, lora_A, lora_B, factor, drop, needs_A, needs_B)
    dbias = dy.sum(0, dtype=torch.float32) if needs_bias else None
    return dx, dA, dB, dbias


def merge(weight: Tensor, mask: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """M * (W + s B A) in fp32, one rounding to the weight's dtype, +0.0 where pruned; (out, in), a new tensor."""
    if _exceeds_fp32(weight, lora_A, lora_B):
        return reference.merge(weight, mask, lora_A, lora_B, scaling)
    with torch.cuda.device_of(weight):
        merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        # The factors as one fp32 term: a checkpoint is written once, so speed does not matter.
        return compose(weight, _unit_columns(mask), lora_A, lora_B, scaling, merged, terms_dtype=torch.float32)


def _fused(rows: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, transposed: bool) -> bool:
    depth = factor_depth(lora_A, lora_B, rows.dtype)
    wide, arch = rows.dtype == torch.float32, tuning.architecture(rows.device)
    return tuning.fused(rows.shape[0], *weight.shape, depth, wide, arch, transposed)


def _exceeds_fp32(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _unit_columns(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.stride(1) == 1 else mask.contiguous()


_buffers: dict[tuple[torch.device, int], Tensor] = {}


def _scratch(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one W_eff, (out, in) in ``dtype``, shared by all layers that run on this device and stream.

    What the stream ran before has read it when the next layer overwrites it. It grows to the largest layer and stays.
    """
    device = weight.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = _buffers.get((device, stream))
    if buffer is None or buffer.numel() < weight.numel() * dtype.itemsize:
        _buffers.pop((device, stream), None)
        buffer = _buffers[device, stream] = torch.empty(
            weight.numel() * dtype.itemsize, dtype=torch.uint8, device=device
        )
    return buffer[: weight.numel() * dtype.itemsize].view(dtype).view(weight.shape)


def free_scratch() -> None:
    """Give the shared scratch back to torch's allocator; the next composed product allocates it anew."""
    _buffers.clear()
