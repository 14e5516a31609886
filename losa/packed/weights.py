"""One weight without its zeros, in the format that suits it."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import pack_bitmask, pack_mask, pack_nm
from losa_kernels.packing import Packed

FORMATS = ("auto", "bitmask", "nm")
# Below this share of zeros packing saves too little to pay for the decoding; a quarter (3:4) still pays.
MIN_SPARSITY = 0.2
# N:M with more than this share of padding in its values is stored as a bitmask.
MAX_PADDING = 0.02


def pack_weight(weight: Tensor, format: str = "auto") -> Packed:
    """Pack what is not zero. Zeros of either sign are dropped and come back as +0.0: models that were pruned by a
    product with a mask are full of -0.0.

    Args:
        weight: (out, in) floating point.
        format: "bitmask"; "nm": the smallest N of every 8 (or of every 4) that holds the weight; "auto": N:M where it
            wastes nearly nothing, else a bitmask.

    Raises:
        ValueError: an unknown format, or "nm" for a width that is no multiple of 4.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    kept = weight != 0
    mask = pack_mask(kept)
    if format == "bitmask":
        return pack_bitmask(weight, mask)
    pattern = _pattern(kept)
    if format == "nm":
        if pattern is None:
            raise ValueError(f"format: nm needs a width that is a multiple of 4, got {weight.shape[1]}")
        return pack_nm(weight, mask, *pattern)
    if pattern is not None:
        keep_n, m = pattern
        stored = keep_n / m * kept.numel()
        if stored > 0 and stored - int(kept.sum()) <= MAX_PADDING * stored:
            return pack_nm(weight, mask, keep_n, m)
    return pack_bitmask(weight, mask)


def _pattern(kept: Tensor) -> tuple[int, int] | None:
    """The densest group decides: (keep_n, m) with the fewest stored values, 4 before 8 where they are equal."""
    found = []
    for m in (4, 8):
        if kept.numel() and kept.shape[1] % m == 0:
            keep_n = max(1, int(kept.reshape(-1, m).sum(1, dtype=torch.int32).max()))
            found.append((keep_n, m))
    return min(found, key=lambda pattern: pattern[0] / pattern[1], default=None)


def zero_share(weight: Tensor) -> float:
    """Share of zeros, 0..1."""
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
