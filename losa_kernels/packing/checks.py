"""What the tensors of a packed weight must agree on: ``field`` and ``shape`` read no data, the other checks do.

Native code trusts these checks, except that it never reads beyond a buffer: wrong data gives wrong numbers there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import arguments

_SLICE = 1 << 15  # bytes


def shape(value: object) -> tuple[int, int]:
    """(out, in) as a plain tuple."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"shape: expected (out, in), got {value!r:.60}")
    rows, columns = (arguments.integer("shape", size) for size in value)
    if rows < 0 or columns < 0:
        raise ValueError(f"shape: expected sizes >= 0, got {(rows, columns)}")
    return rows, columns


def field(
    name: str, value: object, dtype: torch.dtype | None, size: tuple[int, ...], device: torch.device | None = None
) -> None:
    """ValueError unless ``value`` is a contiguous tensor of this dtype (None: floating point), size and device (None:
    any)."""
    tensor = arguments.tensor(name, value)
    right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    where = tensor.device if device is None else device
    if not right or tuple(tensor.shape) != size or tensor.device != where or not tensor.is_contiguous():
        got = f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"{name}: expected {dtype or 'floating point'} {size}, contiguous, on {where}, got {got}")


def kept_per_row(bitmask: Tensor, columns: int) -> Tensor:
    """int64 (out,): how many columns each row keeps. ValueError for a set padding bit."""
    if columns % 8:
        wrong = ((bitmask[:, -1] >> columns % 8) != 0).nonzero()
        if len(wrong):
            raise ValueError(f"bitmask: expected padding bits of 0, got a 1 in row {int(wrong[0])}")
    # On a CPU in slices: large temporaries between the weights of a model that is loaded leave holes in the heap.
    rows = _SLICE // max(1, bitmask.shape[1]) if bitmask.device.type == "cpu" else len(bitmask)
    return torch.cat([_count(part) for part in bitmask.split(max(1, rows))])


def _count(bitmask: Tensor) -> Tensor:
    # Bits are counted in pairs, then in fours, then in eights.
    count = bitmask - (bitmask >> 1 & 0x55)
    count = (count & 0x33) + (count >> 2 & 0x33)
    return ((count + (count >> 4)) & 0x0F).sum(1, dtype=torch.int64)


def bitmask_data(values: Tensor, bitmask: Tensor, row_offsets: Tensor, columns: int) -> None:
    """ValueError unless the rows' counts give the offsets and the number of values."""
    counts = kept_per_row(bitmask, columns)
    total = int(counts.sum())
    if values.numel() != total:
        raise ValueError(f"values: expected {total}, as many as bitmask keeps, got {values.numel()}")
    expected = counts.cumsum(0) - counts
    wrong = (row_offsets != expected).nonzero()
    if len(wrong):
        row = int(wrong[0])
        got = f"expected {int(expected[row])}, got {int(row_offsets[row])} in row {row}"
        raise ValueError(f"row_offsets: expected the sums of the counts of all rows before, {got}")


def nm_data(bitmask: Tensor, columns: int, keep_n: int, m: int, largest_group: int) -> None:
    """ValueError unless each group of m keeps keep_n. ``largest_group``: the most that any keeps."""
    wrong = (kept_per_row(bitmask, columns) != columns // m * keep_n).nonzero()
    if len(wrong) or largest_group > keep_n:
        where = f"a group with {largest_group}" if largest_group > keep_n else f"fewer in row {int(wrong[0])}"
        raise ValueError(f"bitmask: expected exactly {keep_n} kept of every {m}, got {where}")


def data_24(meta: Tensor) -> None:
    """ValueError unless each group's two positions ascend, in whatever order the words are stored."""
    for shift in (0, 4, 8, 12):
        group = meta >> shift
        wrong = ((group & 3) >= (group >> 2 & 3)).nonzero()
        if len(wrong):
            place = tuple(wrong[0].tolist())
            first, second = (int(meta[place]) >> shift + by & 3 for by in (0, 2))
            got = f"{first} and {second} in bits {shift} to {shift + 3} of the word at {place}"
            raise ValueError(f"meta: expected two ascending positions of 0 to 3 in every 4 bits, got {got}")
