"""Unpack, then multiply."""

from __future__ import annotations

from torch import Tensor

from losa_kernels.packing import Packed


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return packed.linear(x, bias)
