"""Rows of packed weights: linears with the same input become one, and parts of one share its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from losa_kernels.packing import Packed, PackedBitmask, PackedNM

__all__ = ["join_rows", "take_rows", "whole_of"]


def join_rows(parts: Sequence[Packed]) -> Packed:
    """One packed weight (sum of out, in) from weights of the same format, in, dtype and pattern.

    Raises:
        ValueError: the parts differ, are none, or are of a format whose rows do not stand alone (``Packed24``).
    """
    kinds = {(type(p), p.shape[1], p.dtype, p.device, getattr(p, "keep_n", None), getattr(p, "m", None)) for p in parts}
    if len(kinds) != 1:
        raise ValueError(f"parts: expected packed weights of one kind, got {len(kinds)} kinds of {len(parts)} parts")
    first = parts[0]
    if not isinstance(first, PackedBitmask | PackedNM):
        raise ValueError(f"parts: rows of {type(first).__name__} cannot be joined")
    shape = (sum(p.shape[0] for p in parts), first.shape[1])
    tensors = [part.tensors() for part in parts]
    joined: dict[str, Any] = {name: torch.cat([of[name] for of in tensors]) for name in ("values", "bitmask")}
    if isinstance(first, PackedBitmask):
        starts = torch.tensor([0, *(part.values.numel() for part in parts[:-1])]).cumsum(0).tolist()
        offsets = [of["row_offsets"] + start for of, start in zip(tensors, starts, strict=True)]
        joined["row_offsets"] = torch.cat(offsets)
    return replace(first, shape=shape, **joined)


def take_rows(packed: Packed, start: int, stop: int) -> Packed:
    """Rows ``start`` to ``stop`` as a packed weight of their own; values and mask are views, and :func:`whole_of` knows
    of what.

    Raises:
        ValueError: not 0 <= start <= stop <= out, or ``Packed24``.
    """
    rows = packed.shape[0]
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"start, stop: expected 0 <= start <= stop <= {rows}, got {start}, {stop}")
    shape = (stop - start, packed.shape[1])
    if isinstance(packed, PackedNM):
        values, bitmask = packed.values[start:stop], packed.bitmask[start:stop]
        return _part_of(replace(packed, shape=shape, values=values, bitmask=bitmask), packed, start)
    if not isinstance(packed, PackedBitmask):
        raise ValueError(f"packed: rows of {type(packed).__name__} do not stand alone")
    edges = [int(packed.row_offsets[row]) if row < rows else packed.values.numel() for row in (start, stop)]
    part = PackedBitmask(
        shape,
        packed.values[slice(*edges)],
        packed.bitmask[start:stop],
        packed.row_offsets[start:stop] - edges[0],
    )
    return _part_of(part, packed, start)


def whole_of(part: Packed) -> tuple[Packed, int] | None:
    """The weight that :func:`take_rows` made this one a part of, and where it begins in it."""
    return getattr(part, "_whole", None)


def _part_of(part: Packed, whole: Packed, start: int) -> Packed:
    object.__setattr__(part, "_whole", (whole, start))
    return part
