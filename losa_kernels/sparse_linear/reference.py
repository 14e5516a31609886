"""Unpack, then multiply."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from losa_kernels.packing import Packed


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    weight = packed.unpack().to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
