"""Centred Gram in one pass over the features: each tile holds a feature column's every sample, so it is centred in
registers, before the product. Splits of the feature axis write partial Grams; their sum is fixed in order and in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa_kernels.cka import reference

COLUMNS = 1 << 15  # most columns that one fp32 accumulator sums
LAUNCH_COLUMNS = 1 << 24  # most columns per launch
PARTIAL_BYTES = 64 << 20  # partial Grams in memory at a time, where one layer's are not more
# Samples and columns together from which a product of split operands is within the error of an fp32 product: what it
# leaves out is at most 14 roundings of the largest entry, where that error grows by one with each of either.
SPLIT_FROM = 64
PROGRAMS_PER_SM = 4  # for one layer: a Gram does not depend on how many are computed together


@triton.jit
def _gram_kernel(
    features,
    partial,
    samples,
    columns,
    columns_per_split,
    stride_layer,
    stride_sample,
    stride_column,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """partial (L, splits, pairs, ROWS, ROWS): this split's share of one pair of row blocks of one layer's Gram.

    features (L, samples, columns) by its strides. With two blocks of ROWS samples, BLOCKS = 2 and there are 3 pairs.
    """
    split, layer, pair = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row_block, column_block = pair // 2, (pair + 1) // 2
    base = features + layer * stride_layer
    rows = tl.arange(0, ROWS)
    start = split.to(tl.int64) * columns_per_split
    stop = tl.minimum(start + columns_per_split, columns)

    total = tl.zeros((ROWS, ROWS), tl.float32)
    for first in range(start, stop, BLOCK_P):
        column = first + tl.arange(0, BLOCK_P)
        inside = column < stop
        place = base + column * stride_column
        # Differences to the first sample are exact where a common component dominates, and exactly 0 where all agree.
        common = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_P]
        left = _differences(place, common, rows, samples, stride_sample, inside)  # [ROWS, BLOCK_P]
        if BLOCKS == 1:
            left -= tl.where(rows[:, None] < samples, tl.sum(left, 0)[None, :] / samples, 0.0)
            # High times low counts twice in the Gram: what is summed is its half, to which the host adds the transpose.
            if SPLIT:
                high, low = _halves(left)
                total = tl.dot(high, tl.trans(0.5 * high), total, input_precision="tf32")
                total = tl.dot(high, tl.trans(low), total, input_precision="tf32")
            else:
                total = tl.dot(left, tl.trans(0.5 * left), total, input_precision="ieee")
        else:
            right = _differences(place, common, rows + ROWS, samples, stride_sample, inside)  # [ROWS, BLOCK_P]
            mean = (tl.sum(left, 0) + tl.sum(right, 0))[None, :] / samples
            left -= mean
            right -= tl.where(rows[:, None] + ROWS < samples, mean, 0.0)
            a_high, a_low = _halves(tl.where(row_block == 0, left, right))
            b_high, b_low = _halves(tl.where(column_block == 0, left, right))
            total = tl.dot(a_high, tl.trans(b_high), total, input_precision="tf32")
            total = tl.dot(a_high, tl.trans(b_low), total, input_precision="tf32")
            total = tl.dot(a_low, tl.trans(b_high), total, input_precision="tf32")
    slot = (layer * tl.num_programs(0) + split) * tl.num_programs(2) + pair
    tl.store(partial + slot * ROWS * ROWS + rows[:, None] * ROWS + rows[None, :], total)


@triton.jit
def _differences(place, common, rows, samples, stride_sample, inside):
    """fp32 [ROWS, BLOCK_P]: samples less the first one, 0 outside; place, common and inside [BLOCK_P]."""
    valid = (rows[:, None] < samples) & inside[None, :]
    places = place[None, :] + rows[:, None].to(tl.int64) * stride_sample
    tile = tl.load(places, mask=valid, other=0.0)  # [ROWS, BLOCK_P]
    return tl.where(valid, tile.to(tl.float32) - common[None, :], 0.0)


@triton.jit
def _halves(value):
    """value = high + low, exactly, with high a tf32 number: their products on tensor cores keep 19 bits, 11 of low's 13
    being read and low times low left out."""
    high = (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, value - high


def gram(features: Tensor) -> Tensor:
    """features (L, n, p) -> (L, n, n) fp64, of fp32 products; fp64 features: the reference."""
    if features.dtype == torch.float64:
        return reference.gram(features)
    count, samples, columns = features.shape
    total = torch.zeros(count, samples, samples, dtype=torch.float64, device=features.device)
    # Triton launches on the current device, whatever device the features are on.
    with torch.cuda.device_of(features):
        if count:
            for part in features.split(LAUNCH_COLUMNS, dim=2) if columns else ():
                total += _gram(part)
    return total


def tile(samples: int, columns: int, capability: int) -> dict[str, int]:
    """The kernel's constants for a number of samples: an accumulator of at most 128 x 128, and tiles of columns that
    leave registers for it (on 8.x and 12.x products take both operands from registers). Below 99 KB of shared memory,
    which every GPU has."""
    split = samples + columns >= SPLIT_FROM
    rows = min(128, max(16, triton.next_power_of_2(samples)))
    blocks = 1 if samples <= rows else 2
    wgmma = 90 <= capability < 120
    most_columns = {16: 128, 32: 128, 64: 64, 128: 32 if wgmma else 16}[rows]
    return {
        "ROWS": rows,
        "BLOCKS": blocks,
        "BLOCK_P": max(16, most_columns // blocks) if split else 16,
        "SPLIT": split,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 2 if rows == 128 else 3,
    }


def _gram(features: Tensor) -> Tensor:
    """(L, n, n) fp64"""
    _, samples, columns = features.shape
    constants = tile(samples, columns, _capability(features.device))
    rows, blocks = constants["ROWS"], constants["BLOCKS"]
    per_split = -(-columns // (PROGRAMS_PER_SM * _processors(features.device)))
    per_split = min(COLUMNS, -(-per_split // constants["BLOCK_P"]) * constants["BLOCK_P"])
    splits = -(-columns // per_split)
    pairs = 1 if blocks == 1 else 3
    layers = max(1, PARTIAL_BYTES // (4 * splits * pairs * rows * rows))
    sums = []
    for part in features.split(layers):
        partial = torch.empty(len(part), splits, pairs, rows, rows, dtype=torch.float32, device=features.device)
        layer, sample, column = part.stride()
        start_kernel(
            _gram_kernel, (splits, len(part), pairs),
            features=part, partial=partial, samples=samples, columns=columns, columns_per_split=per_split,
            stride_layer=layer, stride_sample=sample, stride_column=column, **constants,
        )  # fmt: skip
        sums.append(partial.sum(1, dtype=torch.float64))
    whole = torch.cat(sums)
    if blocks == 1:
        half = whole[:, 0]
    else:
        upper = torch.cat([0.5 * whole[:, 0], whole[:, 1]], 2)
        half = torch.cat([upper, torch.nn.functional.pad(0.5 * whole[:, 2], (rows, 0))], 1)
    return (half + half.mT)[:, :samples, :samples]


def start_kernel(kernel, grid: tuple[int, ...], **arguments) -> None:
    """The one place that launches: tests record here what to compile."""
    kernel[grid](**arguments)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
