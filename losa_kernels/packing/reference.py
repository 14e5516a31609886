"""Packing in plain PyTorch. Values are moved as integers, so that every bit pattern (-0.0, NaN payloads) survives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from losa_kernels.bitmask import pack_mask, unpack_mask
from losa_kernels.tensors import INTEGERS, as_bits


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    return unpack_mask(mask, weight.shape[1])


def pack_bitmask(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(values (nonzeros,), row_offsets (out,) int64: the exclusive prefix sum of the rows' counts)."""
    kept = _kept(weight, mask)
    counts = kept.sum(1)
    values = as_bits(weight)[kept].view(weight.dtype)
    return values, counts.cumsum(0) - counts


def unpack_bitmask(values: Tensor, mask: Tensor, row_offsets: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Dense (out, in). The mask alone says where values go; what takes rows in parallel needs their offsets too."""
    if values.is_meta or isinstance(values, FakeTensor):
        return values.new_empty(shape)
    kept = unpack_mask(mask, shape[1])
    if not torch.compiler.is_compiling() and (total := int(kept.sum())) != values.numel():
        raise ValueError(f"values: expected {total}, as many as bitmask keeps, got {values.numel()}")
    dense = torch.zeros(shape, dtype=INTEGERS[values.element_size()], device=values.device)
    dense[kept] = as_bits(values).reshape(-1)
    return dense.view(values.dtype)


def pack_nm(weight: Tensor, mask: Tensor, keep_n: int, m: int) -> tuple[Tensor, Tensor]:
    """(values (out, in / m * keep_n), packed mask of stored positions).

    A group that keeps fewer than keep_n weights also stores its first pruned positions, as +0.0.
    """
    kept = _kept(weight, mask)
    groups = kept.reshape(-1, m)
    missing = keep_n - groups.sum(1, keepdim=True)
    spare = ~groups
    stored = groups | (spare & (spare.cumsum(1) <= missing))
    values = as_bits(weight).masked_fill(~kept, 0).reshape(-1, m)[stored]
    row = weight.shape[1] // m * keep_n
    return values.view(weight.dtype).reshape(weight.shape[0], row), pack_mask(stored.reshape(kept.shape))


def largest_group(mask: Tensor, in_features: int, m: int) -> int:
    """The most columns that any group of m keeps."""
    kept = unpack_mask(mask, in_features)
    return int(kept.reshape(-1, m).sum(1).max()) if kept.numel() else 0


def pack_24(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(values (out, in / 2), metadata int16 (out, in / 16)): the CUTLASS layout of 16-bit 2:4 weights.

    A group's two stored positions are 2 bits each, four groups fill an int16; the metadata matrix is then reordered as
    the tensor cores read it.
    """
    rows, columns = weight.shape
    values, stored = pack_nm(weight, mask, 2, 4)
    place = torch.arange(4, device=weight.device).expand(rows, columns // 4, 4)
    positions = place[unpack_mask(stored, columns).reshape(place.shape)].reshape(rows, columns // 16, 4, 2)
    nibbles = positions[..., 0] | (positions[..., 1] << 2)
    words = (nibbles << torch.arange(0, 16, 4, device=weight.device)).sum(-1)
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    meta = torch.empty_like(words).view(-1)
    meta[metadata_order(rows, words.shape[1], weight.device)] = words.reshape(-1)
    return values, meta.view(words.shape)


def positions_24(meta: Tensor) -> Tensor:
    """int64 (out, in / 4, 2): the two stored positions of each group of 4."""
    rows, width = meta.shape
    words = meta.reshape(-1)[metadata_order(rows, width, meta.device)].reshape(rows, width).int() & 0xFFFF
    nibbles = (words[..., None] >> torch.arange(0, 16, 4, device=meta.device)) & 15
    return torch.stack([nibbles & 3, nibbles >> 2], -1).reshape(rows, 4 * width, 2).long()


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    rows, half = values.shape
    dense = torch.zeros(rows, half // 2, 4, dtype=torch.int16, device=values.device)
    dense.scatter_(2, positions_24(meta), as_bits(values).reshape(rows, half // 2, 2))
    return dense.reshape(rows, 2 * half).view(values.dtype)


def mask_24(meta: Tensor) -> Tensor:
    """Packed mask of the stored positions."""
    rows, width = meta.shape
    stored = torch.zeros(rows, 4 * width, 4, dtype=torch.bool, device=meta.device)
    return pack_mask(stored.scatter_(2, positions_24(meta), True).reshape(rows, 16 * width))


def metadata_order(rows: int, words: int, device: torch.device | str) -> Tensor:
    """Where word (row, word) of the plain metadata matrix goes in CUTLASS's interleaved storage, flat int64.

    Rows of a group of 32 are shuffled (row 8a + b of 32 goes to 4b + a), 2x2 blocks are transposed, and pairs of
    words are stored column by column.
    """
    row = torch.arange(rows, device=device)[:, None].expand(rows, words)
    word = torch.arange(words, device=device)[None].expand(rows, words)
    to_row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    swap_down = (to_row % 2 == 0) & (word % 2 == 1)
    swap_up = (to_row % 2 == 1) & (word % 2 == 0)
    to_row = to_row + swap_down.long() - swap_up.long()
    to_word = word - swap_down.long() + swap_up.long()
    return (to_word // 2 * rows * 2 + to_row * 2 + to_word % 2).reshape(-1)
