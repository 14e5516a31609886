"""Packing in plain PyTorch. Values are moved as integers, so that every bit pattern (-0.0, NaN payloads) survives."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.bitmask import pack_mask, unpack_mask

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def _kept(weight: Tensor, mask: Tensor) -> Tensor:
    return unpack_mask(mask, weight.shape[1])


def pack_bitmask(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(values (nonzeros,), row_offsets (out,) int64: the exclusive prefix sum of the rows' counts)."""
    kept = _kept(weight, mask)
    counts = kept.sum(1)
    values = as_bits(weight)[kept].view(weight.dtype)
    return values, counts.cumsum(0) - counts


def unpack_bitmask(values: Tensor, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    dense = torch.zeros(shape, dtype=INTEGERS[values.element_size()], device=values.device)
    dense[unpack_mask(mask, shape[1])] = as_bits(values)
    return dense.view(values.dtype)


def pack_nm(weight: Tensor, mask: Tensor, keep_n: int, m: int) -> tuple[Tensor, Tensor]:
    """(values (out, in / m * keep_n), packed mask of stored positions).

    A group that keeps fewer than keep_n weights stores its first pruned positions besides, as +0.0.
    """
    kept = _kept(weight, mask)
    groups = kept.reshape(-1, m)
    missing = keep_n - groups.sum(1, keepdim=True)
    spare = ~groups
    stored = groups | (spare & (spare.cumsum(1) <= missing))
    values = as_bits(weight).masked_fill(~kept, 0).reshape(-1, m)[stored]
    return values.view(weight.dtype).reshape(weight.shape[0], -1), pack_mask(stored.reshape(kept.shape))


def pack_24(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(values (out, in / 2), metadata int16 (out, in / 16)): the CUTLASS layout of 16-bit 2:4 weights.

    A group's two stored positions are 2 bits each, four groups fill an int16; the metadata matrix is then reordered as
    the tensor cores read it.
    """
    values, stored = pack_nm(weight, mask, 2, 4)
    columns = torch.arange(4, device=weight.device).expand(stored.shape[0], weight.shape[1] // 4, 4)
    positions = columns[unpack_mask(stored, weight.shape[1]).reshape(columns.shape)].reshape(weight.shape[0], -1, 4, 2)
    nibbles = positions[..., 0] | (positions[..., 1] << 2)
    words = (nibbles << torch.tensor([0, 4, 8, 12], device=weight.device)).sum(-1)
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    meta = torch.empty_like(words).view(-1)
    meta[metadata_order(*words.shape, weight.device)] = words.reshape(-1)
    return values, meta.view(words.shape)


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    rows, half = values.shape
    words = meta.reshape(-1)[metadata_order(*meta.shape, meta.device)].reshape(meta.shape).int() & 0xFFFF
    nibbles = (words[..., None] >> torch.tensor([0, 4, 8, 12], device=meta.device)) & 15
    positions = torch.stack([nibbles & 3, nibbles >> 2], -1).reshape(rows, half // 2, 2).long()
    dense = torch.zeros(rows, half // 2, 4, dtype=torch.int16, device=values.device)
    dense.scatter_(2, positions, as_bits(values).reshape(rows, half // 2, 2))
    return dense.reshape(rows, 2 * half).view(values.dtype)


def metadata_order(rows: int, words: int, device) -> Tensor:
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
