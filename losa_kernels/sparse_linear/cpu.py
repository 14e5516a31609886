"""Few rows of x: csrc/cpu/sparse_linear/, which reads the packed weight once. More: unpack panels, then multiply.

Weights and x in fp32, bf16 or fp16, in any combination; products and sums are fp32. Other dtypes, and the 2:4 format
of GPUs, take the reference.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.native import product_dtype
from losa_kernels.packing import Packed, PackedBitmask, PackedNM
from losa_kernels.packing.native import unpack_bitmask
from losa_kernels.scratch import scratch
from losa_kernels.sparse_linear import reference

# Rows of x up to which csrc/cpu/sparse_linear/ is taken; at most its own limit of 16.
DECODE_ROWS = 16
PANEL = 1 << 19  # weights unpacked at a time: 2 MB in fp32, to stay in cache until they are multiplied

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if not supported(packed, x, bias):
        return reference.sparse_linear(x, packed, bias)
    few = x.numel() <= DECODE_ROWS * packed.shape[1]
    if few and (per_byte := values_per_byte(packed)):
        return _few_rows_nm(x, packed.values, packed.bitmask, per_byte, bias)
    offsets = packed.row_offsets if isinstance(packed, PackedBitmask) else None
    return (_few_rows if few else _many_rows())(x, packed.values, packed.bitmask, offsets, bias)


def supported(packed: Packed, x: Tensor, bias: Tensor | None) -> TypeGuard[PackedBitmask | PackedNM]:
    return (
        isinstance(packed, (PackedBitmask, PackedNM))
        and packed.shape[1] > 0
        and x.dtype in _FLOATS
        and packed.values.dtype in _FLOATS
        and (bias is None or (bias.dtype in _FLOATS and bias.is_contiguous()))
    )


def values_per_byte(packed: Packed) -> int:
    """Values of every 8 columns where that is one number, so that nothing has to be counted; else 0."""
    if not isinstance(packed, PackedNM) or 8 % packed.m or packed.shape[1] % 8:
        return 0
    return 8 // packed.m * packed.keep_n


def many_rows(x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same by torch's products, a panel of output features at a time.

    The product runs in x's dtype, or in fp32 on a CPU that would emulate it. The panels' memory is one for all layers.
    """
    out_features, in_features = bitmask.shape[0], x.shape[-1]
    wide = product_dtype(x.dtype)
    rows = x.reshape(-1, in_features).to(wide)
    y = x.new_empty(rows.shape[0], out_features)
    per_row = values.numel() // max(1, out_features)
    step = max(64, PANEL // max(1, in_features))
    for start in range(0, out_features, step):
        part = slice(start, min(start + step, out_features))
        shape = (part.stop - start, in_features)
        offsets = None if row_offsets is None else row_offsets[part]
        stored = values if row_offsets is not None else values.reshape(-1)[per_row * start : per_row * part.stop]
        panel = unpack_bitmask(stored, bitmask[part], offsets, shape, out=scratch("unpacked", shape, values.dtype))
        if values.dtype != wide:
            panel = scratch("widened", shape, wide).copy_(panel)
        y[:, part] = rows @ panel.T if bias is None else torch.addmm(bias[part].to(wide), rows, panel.T)
    # No view: one that was made without gradients could not be changed in place where they are enabled.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], out_features))


if native.missing("cpu") is None:
    # Finding them takes as long as all checks together.
    _few_rows, _few_rows_nm = torch.ops.losa.sparse_linear.default, torch.ops.losa.sparse_linear_nm.default

    @torch.library.register_fake("losa::sparse_linear")
    def _(x, values, bitmask, row_offsets, bias):
        return x.new_empty(*x.shape[:-1], bitmask.shape[0])

    @torch.library.register_fake("losa::sparse_linear_nm")
    def _(x, values, bitmask, per_byte, bias):
        return x.new_empty(*x.shape[:-1], bitmask.shape[0])

    # An operator for torch.compile only: panels and their memory are nothing to trace.
    _many_rows_op = torch.library.custom_op(
        "losa::sparse_linear_many_rows",
        many_rows,
        mutates_args=(),
        schema="(Tensor x, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? bias) -> Tensor",
    )

    @_many_rows_op.register_fake
    def _(x, values, bitmask, row_offsets, bias):
        return x.new_empty(*x.shape[:-1], bitmask.shape[0])


def _many_rows():
    return _many_rows_op if torch.compiler.is_compiling() else many_rows
