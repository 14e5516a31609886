"""Packing by csrc/cuda/packing. 2:4 in CUTLASS's layout is plain PyTorch on every device: see reference.py."""

from __future__ import annotations

from torch import Tensor

from losa_kernels.packing import native, reference

GROUPS = (4, 8, 16)

pack_bitmask = native.pack_bitmask
unpack_bitmask = native.unpack_bitmask


def pack_nm(weight: Tensor, mask: Tensor, keep_n: int, m: int) -> tuple[Tensor, Tensor]:
    """(values (out, in / m * keep_n), packed mask of stored positions). Other m than 4, 8, 16 take the reference."""
    return (native if m in GROUPS else reference).pack_nm(weight, mask, keep_n, m)


def largest_group(mask: Tensor, in_features: int, m: int) -> int:
    """The most columns that any group of m keeps. Other m than 4, 8, 16 take the reference."""
    return (native if m in GROUPS else reference).largest_group(mask, in_features, m)
