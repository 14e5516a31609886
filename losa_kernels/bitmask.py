"""The one mask format: uint8 (out, ceil(in / 8)), bit b of byte j (little-endian) is column 8j + b, 1 = kept.

Padding bits are zero.
"""

from __future__ import annotations

import torch

from losa_kernels import arguments, native
from losa_kernels.dispatch import implementation


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool mask (out, in) into bits.

    Returns uint8 (out, ceil(in / 8)) on the mask's device, contiguous, in the bit order of
    ``numpy.packbits(bitorder="little")``. The mask may be strided. Raises ValueError if it is not 2-D or not bool.
    """
    arguments.tensor("mask", mask)
    if mask.dim() != 2:
        raise ValueError(f"mask: expected 2 dimensions (out, in), got shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype torch.bool, got {mask.dtype}")
    return implementation("pack_mask", mask)(mask)


def unpack_mask(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Undo ``pack_mask``: uint8 (out, ceil(in_features / 8)) -> bool (out, in_features), contiguous.

    Padding bits are ignored. Raises ValueError if ``packed`` is not a 2-D uint8 tensor or its width does not fit
    ``in_features``.
    """
    arguments.tensor("packed", packed)
    in_features = arguments.integer("in_features", in_features)
    if packed.dim() != 2:
        raise ValueError(f"packed: expected 2 dimensions (out, ceil(in / 8)), got shape {tuple(packed.shape)}")
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed: expected dtype torch.uint8, got {packed.dtype}")
    if in_features < 0:
        raise ValueError(f"in_features: expected a count >= 0, got {in_features}")
    width = packed_width(in_features)
    if packed.shape[1] != width:
        raise ValueError(f"in_features: {in_features} columns need {width} bytes per row, packed has {packed.shape[1]}")
    return implementation("unpack_mask", packed)(packed, in_features)


def packed_width(in_features: int) -> int:
    """Bytes per packed row."""
    return (in_features + 7) // 8


def check_packed(mask: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError unless ``mask`` is a packed mask of ``weight`` (out, in) on the same device."""
    arguments.tensor("mask", mask)
    expected = (weight.shape[0], packed_width(weight.shape[1]))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != expected:
        raise ValueError(f"mask: expected packed uint8 {expected}, got {mask.dtype} {tuple(mask.shape)}")
    if mask.device != weight.device:
        raise ValueError(f"mask: expected on {weight.device} as weight, got {mask.device}")


def pack_reference(mask: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch ``pack_mask``; the ground truth of its tests."""
    rows, columns = mask.shape
    width = packed_width(columns)
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, 8 * width - columns)).reshape(rows, width, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_reference(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Plain PyTorch ``unpack_mask``; the ground truth of its tests."""
    rows, width = packed.shape
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().reshape(rows, 8 * width)[:, :in_features].contiguous()


def pack_native(mask: torch.Tensor) -> torch.Tensor:
    """csrc/cpu/bitmask/ or csrc/cuda/bitmask.cu, by the mask's device."""
    return torch.ops.losa.pack_mask.default(mask)


def unpack_native(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """csrc/cpu/bitmask/ or csrc/cuda/bitmask.cu, by the packed mask's device."""
    return torch.ops.losa.unpack_mask.default(packed, in_features)


if native.missing("cpu") is None:

    @torch.library.register_fake("losa::pack_mask")
    def _(mask):
        return mask.new_empty((mask.shape[0], packed_width(mask.shape[1])), dtype=torch.uint8)

    @torch.library.register_fake("losa::unpack_mask")
    def _(packed, in_features):
        return packed.new_empty((packed.shape[0], in_features), dtype=torch.bool)
