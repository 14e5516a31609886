"""Packed formats: lossless to the bit, exact sizes, torch's own converter as the oracle of 2:4."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from losa_kernels import native, pack_24, pack_bitmask, pack_mask, pack_nm, unpack_mask
from losa_kernels.packing import native as packing_native
from losa_kernels.packing import reference
from losa_kernels.packing.reference import metadata_order
from losa_kernels.tensors import as_bits
from tests.helpers.packing_problems import expected_bits, hostile, nm_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [0, 1, 8, 13, 32, 40, 63, 64, 72, 200]
needs_native = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 70), st.floats(0, 1), st.sampled_from(DTYPES), st.integers(0, 1000))
def test_bitmask_is_lossless(rows, columns, density, dtype, seed):
    weight = hostile(rows, columns, dtype, seed)
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    packed = pack_bitmask(weight, pack_mask(kept))
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))
    assert torch.equal(unpack_mask(packed.mask(), columns), kept)
    counts = kept.sum(1)
    assert torch.equal(packed.row_offsets, counts.cumsum(0) - counts)
    expected = int(kept.sum()) * weight.element_size() + rows * -(-columns // 8) + 8 * rows
    assert packed.nbytes == expected
    bits = np.unpackbits(packed.bitmask.numpy(), axis=1, count=columns, bitorder="little") if rows else kept.numpy()
    assert np.array_equal(bits.astype(bool), kept.numpy())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 8), (2, 8), (5, 16)]))
def test_nm_is_lossless(rows, groups, pattern):
    keep_n, m = pattern
    for dtype in DTYPES:
        weight = hostile(rows, groups * m, dtype)
        kept = nm_mask(rows, groups * m, keep_n, m)
        packed = pack_nm(weight, pack_mask(kept), keep_n, m)
        assert packed.values.shape == (rows, groups * keep_n)
        assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))
        assert torch.equal(unpack_mask(packed.mask(), groups * m), kept)
        assert packed.nbytes == packed.values.numel() * weight.element_size() + rows * -(-groups * m // 8)


def test_bitmask_clears_padding_bits():
    """A kernel that counts bits would take a set padding bit for one more value."""
    weight, kept = torch.randn(3, 10), torch.rand(3, 10) < 0.5
    mask = pack_mask(kept)
    mask[:, 1] |= 0b11111100
    packed = pack_bitmask(weight, mask)
    assert torch.equal(packed.bitmask, pack_mask(kept)) and packed.values.numel() == int(kept.sum())
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))


def test_formats_are_byte_for_byte_the_documented_examples():
    weight, kept = torch.full((2, 10), 7.0).bfloat16(), torch.zeros(2, 10, dtype=torch.bool)
    for place, value in (((0, 0), 1.0), ((0, 3), -0.0), ((0, 9), 2.0), ((1, 4), -1.0)):
        weight[place], kept[place] = value, True
    packed = pack_bitmask(weight, pack_mask(kept))
    assert as_bits(packed.values).numpy().tobytes().hex(" ", 2) == "803f 0080 0040 80bf"
    assert packed.bitmask.numpy().tobytes().hex() == "09021000"
    assert packed.row_offsets.numpy().tobytes().hex() == "00" * 8 + "03" + "00" * 7
    weight, kept = torch.tensor([[7, 1, 7, 2, 7, 7, -1, 7]]).bfloat16(), torch.zeros(1, 8, dtype=torch.bool)
    kept[0, [1, 3, 6]] = True
    packed = pack_nm(weight, pack_mask(kept), 2, 4)
    assert as_bits(packed.values).numpy().tobytes().hex(" ", 2) == "803f 0040 0000 80bf"
    assert packed.bitmask.numpy().tobytes().hex() == "5a"
    order = metadata_order(32, 4, "cpu").reshape(32, 4)
    assert [int(order[place]) for place in ((0, 0), (0, 1), (1, 0), (1, 1), (8, 0))] == [0, 2, 8, 10, 1]


def test_nm_fills_short_groups_with_positive_zero():
    weight = torch.full((1, 8), -1.0)
    kept = torch.tensor([[False, False, True, False, False, False, False, False]])
    packed = pack_nm(weight, pack_mask(kept), 2, 4)
    stored = unpack_mask(packed.bitmask, 8)[0].tolist()
    assert stored == [True, False, True, False, True, True, False, False]
    assert torch.equal(as_bits(packed.values), as_bits(torch.tensor([[0.0, -1.0, 0.0, 0.0]])))
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 192), (32, 320)])
def test_24_is_torchs_cutlass_layout(dtype, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    kept = nm_mask(*shape, 2, 4)
    packed = pack_24(weight, pack_mask(kept))
    values, meta = sparse_semi_structured_from_dense_cutlass(weight * kept)
    assert torch.equal(packed.values, values)
    assert torch.equal(packed.meta, meta)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed.values, packed.meta), weight * kept)
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))
    assert torch.equal(unpack_mask(packed.mask(), shape[1]), kept)
    assert packed.nbytes == weight.numel() + weight.numel() // 8 and packed.dtype == dtype and packed.shape == shape


def test_24_keeps_hostile_values():
    weight = hostile(32, 64, torch.bfloat16)
    kept = nm_mask(32, 64, 2, 4)
    assert torch.equal(as_bits(pack_24(weight, pack_mask(kept)).unpack()), expected_bits(weight, kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_24_fills_short_groups_with_positive_zero(dtype):
    weight, kept = -torch.ones(32, 64, dtype=dtype), nm_mask(32, 64, 1, 4)
    kept[:8] = False
    packed = pack_24(weight, pack_mask(kept))
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))
    stored = unpack_mask(packed.mask(), 64)
    assert bool((stored.reshape(-1, 4).sum(1) == 2).all()) and not bool((kept & ~stored).any())
    # The oracle stores zeros of short groups in places of its own choice: compare what it reads, not what it writes.
    dense = sparse_semi_structured_to_dense_cutlass(packed.values, packed.meta)
    assert torch.equal(dense, weight.masked_fill(~kept, 0))


@pytest.mark.parametrize("shape", [(0, 64), (32, 0)])
def test_24_of_nothing(shape):
    packed = pack_24(torch.zeros(shape, dtype=torch.float16), torch.zeros(shape[0], shape[1] // 8, dtype=torch.uint8))
    assert packed.unpack().shape == shape and packed.mask().shape == (shape[0], shape[1] // 8) and packed.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_byte_weights(dtype):
    weight, kept = torch.randn(8, 24).to(dtype), nm_mask(8, 24, 2, 8)
    for packed in (pack_bitmask(weight, pack_mask(kept)), pack_nm(weight, pack_mask(kept), 2, 8)):
        assert packed.dtype == dtype and torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))


@pytest.mark.parametrize("density", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_native_bitmask_is_the_references(isa, dtype, density, poisoned_native_memory):
    for columns in WIDTHS:
        weight, kept = hostile(11, columns, torch.float32).to(dtype), torch.rand(11, columns) < density
        kept[4] = False
        for stored in (weight, weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :columns]):
            mask = pack_mask(kept)
            wide = torch.cat([mask, mask], 1)[:, : mask.shape[1]]
            values, offsets = packing_native.pack_bitmask(stored, wide)
            expected, expected_offsets = reference.pack_bitmask(weight, mask)
            assert torch.equal(as_bits(values), as_bits(expected)) and values.dtype == dtype
            assert torch.equal(offsets, expected_offsets)
            dense = packing_native.unpack_bitmask(values, wide, offsets, weight.shape)
            assert torch.equal(as_bits(dense), expected_bits(weight, kept))


@pytest.mark.parametrize("pattern", [(1, 2), (1, 4), (2, 4), (2, 8), (4, 8), (8, 8), (1, 1), (5, 16), (2, 3), (3, 12)])
def test_native_nm_is_the_references(isa, pattern, poisoned_native_memory):
    """Groups that end within bytes, and rows whose groups are all full, partly short or empty."""
    keep_n, m = pattern
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for groups in (0, 1, 2, 7, 24):
            weight, kept = hostile(9, groups * m, dtype), nm_mask(9, groups * m, keep_n, m)
            kept[3:6] &= torch.rand(3, groups * m) < 0.5
            kept[6] = False
            mask = pack_mask(kept)
            values, stored = packing_native.pack_nm(weight, mask, keep_n, m)
            expected, expected_stored = reference.pack_nm(weight, mask, keep_n, m)
            assert torch.equal(as_bits(values), as_bits(expected)) and values.shape == expected.shape
            assert torch.equal(stored, expected_stored)
            most = packing_native.largest_group(mask, groups * m, m)
            assert most == reference.largest_group(mask, groups * m, m) == (keep_n if groups else 0)
            dense = packing_native.unpack_bitmask(values, stored, None, weight.shape)
            assert torch.equal(as_bits(dense), expected_bits(weight, kept))


@needs_native
def test_unpacking_some_rows_into_given_memory():
    weight, kept = hostile(20, 72, torch.bfloat16), torch.rand(20, 72) < 0.4
    packed, part = pack_bitmask(weight, pack_mask(kept)), slice(7, 15)
    out = torch.full((8, 72), 3.0).bfloat16()
    dense = packing_native.unpack_bitmask(
        packed.values, packed.bitmask[part], packed.row_offsets[part], (8, 72), out=out
    )
    assert dense is out and torch.equal(as_bits(out), expected_bits(weight, kept)[part])


@needs_native
def test_more_rows_than_one_task():
    weight, kept = hostile(300, 600, torch.float16), torch.rand(300, 600) < 0.5
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        packed = pack_bitmask(weight, pack_mask(kept))
        assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))
    finally:
        torch.set_num_threads(before)


@needs_native
def test_damaged_offsets_stay_in_the_buffer(isa):
    """Wrong numbers may come out, but nothing beyond the values is read."""
    weight, mask = torch.ones(4, 64), pack_mask(torch.ones(4, 64, dtype=torch.bool))
    values, _ = packing_native.pack_bitmask(weight, mask)
    offsets = torch.tensor([-5, 250, 1 << 40, -(1 << 40)])
    dense = packing_native.unpack_bitmask(values, mask, offsets, (4, 64))
    assert torch.equal(dense.sum(1), torch.tensor([64.0, 6.0, 0.0, 64.0]))


@needs_native
def test_operators_check_what_python_did_not():
    weight, mask = torch.ones(2, 16), torch.full((2, 2), 255, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mask: expected at most 2 kept of every 4"):
        packing_native.pack_nm(weight, mask, 2, 4)
    with pytest.raises(RuntimeError, match="mask: expected a uint8 tensor"):
        packing_native.pack_bitmask(weight, mask[:, :1])
    with pytest.raises(RuntimeError, match="values: expected rows of equal length"):
        packing_native.unpack_bitmask(torch.ones(31), mask, None, (2, 16))
    with pytest.raises(RuntimeError, match="row_offsets: expected int64"):
        packing_native.unpack_bitmask(torch.ones(32), mask, torch.zeros(2), (2, 16))


@needs_native
def test_opcheck():
    weight, mask = torch.randn(5, 24), pack_mask(nm_mask(5, 24, 2, 4))
    values, offsets = packing_native.pack_bitmask(weight, mask)
    ops = torch.ops.losa
    torch.library.opcheck(ops.pack_bitmask.default, (weight, mask))
    torch.library.opcheck(ops.pack_nm.default, (weight, mask, 2, 4))
    torch.library.opcheck(ops.largest_group.default, (mask, 24, 4))
    torch.library.opcheck(ops.unpack_bitmask.default, (torch.zeros(5, 24), values, mask, offsets))
    torch.library.opcheck(ops.unpack_bitmask.default, (torch.zeros(5, 24), values.reshape(5, -1), mask, None))


def test_packed_tensors_are_detached_copies_of_any_layout():
    parameter = torch.nn.Parameter(torch.randn(64, 32).bfloat16().T)
    kept, before = nm_mask(32, 64, 2, 4), parameter.detach().clone()
    mask = pack_mask(kept)
    formats = [pack_bitmask(parameter, mask), pack_nm(parameter, mask, 2, 4), pack_24(parameter, mask)]
    with torch.no_grad():
        parameter.zero_()
    mask.zero_()
    for packed in formats:
        assert not packed.values.requires_grad
        assert torch.equal(as_bits(packed.unpack()), expected_bits(before, kept))
        assert torch.equal(unpack_mask(packed.mask(), 64), kept)


def test_packed_objects_are_frozen_and_compare_by_identity():
    weight, mask = torch.randn(32, 64).half(), pack_mask(nm_mask(32, 64, 2, 4))
    for pack in (pack_bitmask, lambda w, k: pack_nm(w, k, 2, 4), pack_24):
        packed = pack(weight, mask)
        with pytest.raises(FrozenInstanceError):
            packed.shape = (1, 1)
        assert packed == packed and packed != pack(weight, mask) and len({packed, packed}) == 1


def test_to_moves_every_tensor():
    weight, kept = torch.randn(32, 64).bfloat16(), nm_mask(32, 64, 2, 4)
    mask = pack_mask(kept)
    for packed in (pack_bitmask(weight, mask), pack_nm(weight, mask, 2, 4), pack_24(weight, mask)):
        moved = packed.to("meta")
        assert moved.device.type == "meta" and moved.nbytes == packed.nbytes
        assert all(t.is_meta for t in moved.tensors().values())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w, k: pack_bitmask(w[0], k), "weight: expected floating point"),
        (lambda w, k: pack_bitmask(w, k[:, :3]), "mask: expected packed uint8"),
        (lambda w, k: pack_bitmask(w, k.bool()), "mask: expected packed uint8"),
        (lambda w, k: pack_bitmask(w.int(), k), "weight: expected floating point"),
        (lambda w, k: pack_bitmask(w, k.to("meta")), "mask: expected on cpu"),
        (lambda w, k: pack_nm(w, k, 1, 4), "mask: expected at most 1 kept of every 4"),
        (lambda w, k: pack_nm(w, k, 2, 5), "m: expected a divisor"),
        (lambda w, k: pack_nm(w, k, 5, 4), "keep_n: expected"),
        (lambda w, k: pack_24(w, k), "weight: expected bfloat16 or float16"),
        (lambda w, k: pack_24(w[:16].half(), k[:16]), "multiple of 32"),
        (lambda w, k: pack_24(w.half(), ~k & 0x77 | k), "mask: expected at most 2 kept of every 4"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(32, 64), pack_mask(nm_mask(32, 64, 2, 4)))
