"""Few rows of x: csrc/cpu/sparse_linear/, which takes the weight as one of which nothing is pruned and reads it at the
memory's rate. Everything else: torch, whose products of fp32 vectors and of many rows are as fast or faster."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.dense_linear import reference
from losa_kernels.native import cpu_has_bf16


def _rows(dtype: torch.dtype) -> range:
    """Of x, that are multiplied here."""
    if dtype == torch.float32:
        return range(4, 13)  # torch reads the weight more than once
    if dtype == torch.float16:
        return range(1, 5)
    return range(1, 3 if cpu_has_bf16() else 17)


SERVED = {dtype: _rows(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.numel() // max(1, weight.shape[1])
    if (
        rows not in SERVED.get(weight.dtype, ())
        or not weight.is_contiguous()
        or not (bias is None or bias.is_contiguous())
    ):
        return reference.dense_linear(x, weight, bias)
    return _few_rows(x, weight, bias)


if native.missing("cpu") is None:
    _few_rows = torch.ops.losa.dense_linear.default

    @torch.library.register_fake("losa::dense_linear")
    def _(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.shape[0])
