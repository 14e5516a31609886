"""Few rows of x: kernels that read the packed weight once. More: unpack, then multiply.

Weights and x in fp32, bf16 or fp16; sums are fp32, and so are products unless weights and x are of one 16-bit dtype.
Those choose among three ways (ways.py); all others take csrc/cuda/sparse_linear/sparse_linear.cu, whose head has
a table of its kernels. The unpacked weight is a temporary: torch's allocator gives all layers the same memory.

``LOSA_24=cutlass`` runs 2:4 weights (``pack_24``) of x's dtype by torch's semi-structured product instead of unpacking
them. torch has that for GPUs of compute capability 8.x only, and it pays for many rows only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from losa_kernels import settings
from losa_kernels.packing import Packed, Packed24, PackedBitmask, PackedNM
from losa_kernels.sparse_linear import reference, tiles, ways
from losa_kernels.sparse_linear.cpu import supported, values_per_byte

DECODE_ROWS = 16  # the kernels' limit
MULTIPLE_24 = 16  # rows of x that torch's semi-structured product takes
MAJOR_24 = 8  # of the compute capability that it asks for


def sparse_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    if isinstance(packed, Packed24) and x.dtype == packed.dtype and x.numel() > 0 and use_semi_structured(x.device):
        return semi_structured(x, packed, bias)
    if not supported(packed, x, bias) or x.numel() > DECODE_ROWS * packed.shape[1]:
        return reference.sparse_linear(x, packed, bias)
    if x.dtype == packed.dtype and x.numel() > 0 and tiles.supported(packed):
        return _by(ways.choose(x, packed, lambda way: _by(way, x, packed, bias)), x, packed, bias)
    return window(x, packed, bias)


def _by(way: str, x: Tensor, packed: PackedBitmask | PackedNM, bias: Tensor | None) -> Tensor:
    if way == "unpack":
        return reference.sparse_linear(x, packed, bias)
    if way == "tiles":
        made = ways.held_by(packed).tiles
        # Another thread, whose batch chose otherwise, may have let go of them.
        if made is None and not torch.compiler.is_compiling():
            made = ways.tiles_of(packed)
        assert made is not None
        return tiles.multiply(x, made, bias)
    return window(x, packed, bias)


def window(x: Tensor, packed: PackedBitmask | PackedNM, bias: Tensor | None) -> Tensor:
    """By the window kernel or the row kernel of csrc/cuda/sparse_linear/sparse_linear.cu."""
    # Of two different 16-bit dtypes the product is fp32.
    rows = x if x.dtype in (packed.dtype, torch.float32) else x.float()
    if per_byte := values_per_byte(packed):
        y = torch.ops.losa.sparse_linear_nm.default(rows, packed.values, packed.bitmask, per_byte, bias)
    else:
        offsets = packed.row_offsets if isinstance(packed, PackedBitmask) else None
        y = torch.ops.losa.sparse_linear.default(rows, packed.values, packed.bitmask, offsets, bias)
    return y if rows is x else y.to(x.dtype)


def use_semi_structured(device: torch.device) -> bool:
    """Whether ``LOSA_24`` asks for torch's semi-structured product.

    Raises:
        ValueError: the setting has a value that is not allowed.
        RuntimeError: it asks for the product on a GPU that torch has none for.
    """
    if settings.WEIGHTS_24() == "unpack":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    if major != MAJOR_24:
        raise RuntimeError(
            f"LOSA_24=cutlass: torch's 2:4 product needs a GPU of compute capability {MAJOR_24}.x, this one has "
            f"{major}.{minor}; LOSA_24=unpack runs on it"
        )
    return True


def semi_structured(x: Tensor, packed: Packed24, bias: Tensor | None) -> Tensor:
    """The same by torch's CUTLASS kernel, which reads the format as it is; rows of x are padded for it."""
    rows = x.reshape(-1, packed.shape[1])
    count = rows.shape[0]
    columns = F.pad(rows, (0, 0, 0, -count % MULTIPLE_24)).T
    if bias is None:
        y = torch._sparse_semi_structured_mm(packed.values, packed.meta, columns)
    else:
        y = torch._sparse_semi_structured_addmm(bias.to(x.dtype), packed.values, packed.meta, columns)
    return y.T[:count].reshape(*x.shape[:-1], packed.shape[0])
