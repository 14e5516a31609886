"""The CUDA packing kernels: in the emulator on every machine, and on a GPU where there is one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from losa_kernels import pack_24, pack_bitmask, pack_mask, pack_nm, unpack_mask
from losa_kernels.packing import cuda, reference
from losa_kernels.packing.rows import take_rows
from losa_kernels.tensors import INTEGERS, as_bits
from tests.helpers.emulation import load
from tests.helpers.packing_problems import expected_bits, hostile, nm_mask

INTS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
SHAPES = [(1, 1), (3, 7), (9, 40), (2, 256), (11, 300), (5, 523)]
PATTERNS = [(1, 4), (2, 4), (3, 8), (8, 8), (5, 16), (16, 16)]


def masks(rows, columns):
    """Half kept, with a full and an empty row where there are enough; then all and nothing."""
    kept = torch.rand(rows, columns) < 0.5
    if rows > 2:
        kept[0], kept[2] = True, False
    return kept, torch.ones_like(kept), torch.zeros_like(kept)


def padded(matrix, more):
    """The same rows, ``more`` elements further apart, ending where the last row's columns end."""
    rows, columns = matrix.shape
    wide = torch.full((rows, columns + more), 0xA5 if matrix.dtype == torch.uint8 else 1, dtype=matrix.dtype)
    wide[:, :columns] = matrix
    return wide.flatten()[: (rows - 1) * (columns + more) + columns]


def is_aligned(stride, size):
    return stride * size % (8 if size == 1 else 16) == 0


@pytest.fixture
def pack_emulated(emulate):
    def run(weight, mask, keep_n=0, m=0, more=0, seed=0, shares=-1, lead=0):
        """(values, offsets, stored) as integers of the weight's element size."""
        (rows, columns), size, width = weight.shape, weight.element_size(), mask.shape[1]
        aligned = is_aligned(columns + more, size)
        numbers = (rows, columns, columns + more, width + more, aligned, size, keep_n, m, shares, lead)
        arrays = {"weight": padded(as_bits(weight), more), "mask": padded(mask, more)}
        folder = emulate("packing", "pack", *numbers, seed=seed, result="values", **arrays)
        values = load(folder, "values", INTS[size], -1)
        assert values[:lead].eq(0xA5).all()  # as they were
        return (
            values[lead:],
            load(folder, "offsets", np.int64, rows),
            load(folder, "stored", np.uint8, rows, width),
        )

    return run


@pytest.fixture
def unpack_emulated(emulate):
    def run(values, mask, offsets, shape, more=0, seed=0, shares=-1, lead=0):
        size, width = values.element_size(), mask.shape[1]
        numbers = (*shape, 0, width + more, is_aligned(shape[1], size), size, 0, 0, shares, lead)
        values = torch.cat([torch.full((lead,), 0x5A, dtype=values.dtype), values.flatten()])
        arrays = {"values": values, "mask": padded(mask, more), "offsets": offsets}
        folder = emulate("packing", "unpack", *numbers, seed=seed, result="dense", **arrays)
        return load(folder, "dense", INTS[size], *shape)

    return run


@pytest.mark.subprocess
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_bitmask_is_the_references(pack_emulated, unpack_emulated, shape, dtype):
    for seed, kept in enumerate(masks(*shape)):
        weight, mask = hostile(*shape, dtype), pack_mask(kept)
        expected, expected_offsets = reference.pack_bitmask(weight, mask)
        values, offsets, _ = pack_emulated(weight, mask, more=seed * 3, seed=seed)
        assert torch.equal(values, as_bits(expected)) and torch.equal(offsets, expected_offsets)
        assert torch.equal(unpack_emulated(values, mask, offsets, shape, more=seed), expected_bits(weight, kept))


@pytest.mark.subprocess
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_emulated_elements_of_other_sizes(pack_emulated, unpack_emulated, dtype):
    weight, kept = torch.randn(3, 272).to(dtype), torch.rand(3, 272) < 0.6
    values, offsets, _ = pack_emulated(weight, pack_mask(kept))
    assert torch.equal(values, as_bits(weight)[kept])
    assert torch.equal(unpack_emulated(values, pack_mask(kept), offsets, (3, 272)), expected_bits(weight, kept))


@pytest.mark.subprocess
@pytest.mark.parametrize("size", INTS)
def test_emulated_rows_in_slices(pack_emulated, unpack_emulated, size):
    """Rows of several batches, shared by several warps, whose values begin anywhere; every bit pattern."""
    batch = 2048 // max(size, 2)
    for shares, columns in ((0, 2 * batch + 72), (1, 2 * batch), (2, 3 * batch + 5), (3, 8 * batch + 264), (3, batch)):
        weight = torch.randint(-(1 << 62), 1 << 62, (3, columns)).to(INTEGERS[size])
        kept = torch.rand(3, columns) < torch.tensor([[0.5], [0.02], [0.97]])
        mask, expected = pack_mask(kept), weight.masked_fill(~kept, 0)
        for lead in (0, 1, 16 // size - 1):
            values, offsets, _ = pack_emulated(weight, mask, shares=shares, lead=lead, seed=lead)
            assert torch.equal(values, as_bits(weight)[kept])
            dense = unpack_emulated(values, mask, offsets, (3, columns), shares=shares, lead=lead, seed=shares)
            assert torch.equal(dense, as_bits(expected))


@pytest.mark.subprocess
@pytest.mark.parametrize("m", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_emulated_nm_in_slices(pack_emulated, unpack_emulated, m, dtype):
    keep_n, shape = m // 2 - 1, (3, 2 * 1024 + 80)
    weight, kept = torch.randn(shape).to(dtype), nm_mask(*shape, keep_n, m)
    as_bits(weight)[:, ::3] = as_bits(torch.tensor([-0.0]).to(dtype))
    kept[1] &= torch.rand(shape[1]) < 0.7
    mask = pack_mask(kept)
    expected, expected_stored = reference.pack_nm(weight, mask, keep_n, m)
    for shares in range(4):
        values, _, stored = pack_emulated(weight, mask, keep_n, m, shares=shares, lead=shares)
        assert torch.equal(values, as_bits(expected).flatten()) and torch.equal(stored, expected_stored)
        dense = unpack_emulated(values, stored, None, shape, shares=shares, lead=shares)
        assert torch.equal(dense, expected_bits(weight, kept))


@pytest.mark.subprocess
def test_emulated_padding_bits_are_no_columns(pack_emulated, unpack_emulated):
    weight, kept = torch.randn(3, 10), torch.rand(3, 10) < 0.5
    mask = pack_mask(kept)
    mask[:, 1] |= 0b11111100
    values, offsets, _ = pack_emulated(weight, mask)
    assert torch.equal(values, as_bits(weight)[kept])
    assert torch.equal(unpack_emulated(values, mask, offsets, (3, 10)), expected_bits(weight, kept))


@pytest.mark.subprocess
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_emulated_nm_is_the_references(emulate, pack_emulated, unpack_emulated, pattern):
    keep_n, m = pattern
    for groups, dtype in ((1, torch.float32), (5, torch.bfloat16), (40, torch.float32), (67, torch.bfloat16)):
        shape = (7, groups * m)
        weight, kept = hostile(*shape, dtype), nm_mask(*shape, keep_n, m)
        kept[3:5] &= torch.rand(2, groups * m) < 0.5
        kept[6] = False
        mask = pack_mask(kept)
        expected, expected_stored = reference.pack_nm(weight, mask, keep_n, m)
        values, _, stored = pack_emulated(weight, mask, keep_n, m, more=groups % 2, seed=groups)
        assert torch.equal(values, as_bits(expected).flatten()) and torch.equal(stored, expected_stored)
        assert torch.equal(unpack_emulated(values, stored, None, shape), expected_bits(weight, kept))
        folder = emulate("packing", "largest", *shape, 0, mask.shape[1], 0, 0, 0, m, 0, 0, mask=mask, result="largest")
        assert load(folder, "largest", np.int64, 1).item() == keep_n


@pytest.mark.subprocess
def test_emulated_groups_that_keep_too_many_stay_in_their_rows(pack_emulated):
    """The public function refuses them; the kernel must not write beyond its row either."""
    weight, kept = torch.randn(3, 24), torch.zeros(3, 24, dtype=torch.bool)
    kept[:, :8] = True
    values, _, stored = pack_emulated(weight, pack_mask(kept), 2, 8)
    assert unpack_mask(stored, 24).reshape(3, 3, 8).sum(2).eq(2).all()
    assert torch.equal(values.reshape(3, 6)[:, :2], as_bits(weight)[:, :2])


@pytest.mark.subprocess
def test_emulated_damaged_offsets_stay_in_the_buffer(unpack_emulated):
    mask = pack_mask(torch.ones(4, 64, dtype=torch.bool))
    offsets = torch.tensor([-5, 250, 1 << 40, -(1 << 40)])
    dense = unpack_emulated(torch.ones(256, dtype=torch.int32), mask, offsets, (4, 64))
    assert dense.sum(1).tolist() == [64, 6, 0, 64]


@pytest.mark.subprocess
def test_emulated_offsets_of_more_rows_than_threads(pack_emulated):
    kept = torch.rand(2055, 9) < 0.5
    values, offsets, _ = pack_emulated(torch.randn(2055, 9), pack_mask(kept))
    counts = kept.sum(1)
    assert torch.equal(offsets, counts.cumsum(0) - counts) and values.numel() == counts.sum()


@pytest.mark.subprocess
@pytest.mark.parametrize(("fails", "expected"), [(0, [0, 7]), (1, [1, -1])])
def test_memory_that_a_kernel_writes_is_waited_for(emulate, fails, expected):
    """Also when an exception ends the call before its own wait."""
    folder = emulate("packing", "late", fails, result="waits")
    assert np.fromfile(folder / "waits", np.int64).tolist() == expected


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tiny_on_gpu(dtype):
    for shape in SHAPES:
        weight = hostile(*shape, dtype)
        for kept in masks(*shape):
            packed = pack_bitmask(weight.cuda(), pack_mask(kept).cuda())
            expected = pack_bitmask(weight, pack_mask(kept))
            assert torch.equal(packed.row_offsets.cpu(), expected.row_offsets)
            assert torch.equal(as_bits(packed.values).cpu(), as_bits(expected.values))
            assert torch.equal(as_bits(packed.unpack()).cpu(), expected_bits(weight, kept))


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_long_rows_in_slices_on_gpu(dtype):
    """Few rows, which several warps share; the last two rows' values begin anywhere in memory."""
    for columns in (4096, 9003):
        weight, kept = torch.randn(3, columns).to(dtype), torch.rand(3, columns) < 0.5
        packed = pack_bitmask(weight.cuda(), pack_mask(kept).cuda())
        assert torch.equal(as_bits(packed.values).cpu(), as_bits(weight)[kept])
        for part, start in ((packed, 0), (take_rows(packed, 1, 3), 1)):
            assert torch.equal(as_bits(part.unpack()).cpu(), expected_bits(weight, kept)[start:])


@pytest.mark.gpu
def test_threads_with_streams_of_their_own_on_gpu():
    weight = torch.randn(512, 1024, device="cuda").bfloat16()
    masks = [pack_mask(torch.rand(512, 1024, device="cuda") < density) for density in (0.1, 0.4, 0.7, 1.0)]
    expected = [reference.pack_bitmask(weight, mask) for mask in masks]
    torch.cuda.synchronize()

    def run(mask, values, offsets):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                packed = pack_bitmask(weight, mask)
                if not (torch.equal(packed.values, values) and torch.equal(packed.row_offsets, offsets)):
                    return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, masks, *zip(*expected, strict=True)))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*PATTERNS, (3, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nm_on_gpu(pattern, dtype):
    keep_n, m = pattern
    weight, kept = hostile(70, 67 * m, dtype), nm_mask(70, 67 * m, keep_n, m)
    kept[3:6] &= torch.rand(3, 67 * m) < 0.5
    packed, expected = (pack_nm(weight.to(d), pack_mask(kept).to(d), keep_n, m) for d in ("cuda", "cpu"))
    assert torch.equal(as_bits(packed.values).cpu(), as_bits(expected.values))
    assert torch.equal(packed.bitmask.cpu(), expected.bitmask)
    assert torch.equal(as_bits(packed.unpack()).cpu(), expected_bits(weight, kept))
    with pytest.raises(ValueError, match="mask: expected at most"):
        pack_nm(weight.cuda(), torch.full_like(packed.bitmask, 255), keep_n, m) if keep_n < m else pack_nm(
            weight.cuda(), torch.full_like(packed.bitmask, 255), keep_n - 1, m
        )


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_full_size_on_gpu_repeats_to_the_bit(density):
    weight, kept = torch.randn(4096, 4096, device="cuda").bfloat16(), torch.rand(4096, 4096, device="cuda") < density
    mask = pack_mask(kept)
    packed, again = pack_bitmask(weight, mask), pack_bitmask(weight, mask)
    assert torch.equal(packed.values, again.values) and torch.equal(packed.row_offsets, again.row_offsets)
    assert torch.equal(as_bits(packed.values), as_bits(weight)[kept])
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))


@pytest.mark.gpu
def test_24_on_gpu():
    weight, kept = hostile(64, 128, torch.bfloat16), nm_mask(64, 128, 2, 4)
    packed, expected = (pack_24(weight.to(d), pack_mask(kept).to(d)) for d in ("cuda", "cpu"))
    assert torch.equal(packed.meta.cpu(), expected.meta)
    assert torch.equal(as_bits(packed.unpack()).cpu(), expected_bits(weight, kept))


def test_other_groups_go_to_the_reference():
    weight, kept = torch.randn(4, 24), nm_mask(4, 24, 5, 12)
    values, stored = cuda.pack_nm(weight, pack_mask(kept), 5, 12)
    assert torch.equal(values.flatten(), weight[kept]) and torch.equal(stored, pack_mask(kept))
    assert cuda.largest_group(pack_mask(kept), 24, 12) == 5
    assert set(INTS) == set(INTEGERS)
