"""Packing by csrc/cpu/packing/, or csrc/cuda/packing/ where the tensors lie there. The operators' fake kernels are
here too."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments, native


def pack_bitmask(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(values (nonzeros,), row_offsets (out,) int64)."""
    return torch.ops.losa.pack_bitmask.default(weight, mask)


def pack_nm(weight: Tensor, mask: Tensor, keep_n: int, m: int) -> tuple[Tensor, Tensor]:
    """(values (out, in / m * keep_n), packed mask of stored positions)."""
    return torch.ops.losa.pack_nm.default(weight, mask, keep_n, m)


def largest_group(mask: Tensor, in_features: int, m: int) -> int:
    """The most columns that any group of m keeps."""
    return int(torch.ops.losa.largest_group.default(mask, in_features, m))


def unpack_bitmask(
    values: Tensor, mask: Tensor, row_offsets: Tensor | None, shape: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """Dense (out, in), in ``out`` (contiguous, of that shape and the dtype of values) if it is given.

    ``row_offsets`` None: rows with equally many values. With offsets, ``mask`` and the offsets may belong to
    some of the rows alone.
    """
    dense = values.new_empty(shape) if out is None else out
    torch.ops.losa.unpack_bitmask.default(dense, values, mask, row_offsets)
    return dense


if native.missing("cpu") is None:

    @torch.library.register_fake("losa::pack_bitmask")
    def _(weight, mask):
        kept = torch.library.get_ctx().new_dynamic_size()
        return weight.new_empty(kept), weight.new_empty(weight.shape[0], dtype=torch.int64)

    @torch.library.register_fake("losa::pack_nm")
    def _(weight, mask, keep_n, m):
        arguments.pattern(keep_n, m, weight.shape[1])
        values = weight.new_empty(weight.shape[0], weight.shape[1] // m * keep_n)
        return values, mask.new_empty(mask.shape)

    @torch.library.register_fake("losa::largest_group")
    def _(mask, in_features, m):
        return mask.new_empty((), dtype=torch.int64)

    @torch.library.register_fake("losa::unpack_bitmask")
    def _(dense, values, bitmask, row_offsets):
        return None
