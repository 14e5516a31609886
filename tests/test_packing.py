"""Packed formats: lossless to the bit, exact sizes, torch's own converter as the oracle of 2:4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from losa_kernels import pack_24, pack_bitmask, pack_mask, pack_nm, sparse_linear, unpack_mask
from losa_kernels.packing.reference import as_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def hostile(rows, columns, dtype, seed=0):
    """A weight with every value that a careless format loses."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    flat = weight.view(-1)
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan")]
    where = torch.randperm(flat.numel(), generator=generator)[: 4 * len(special)]
    for position, value in zip(where, special * 4, strict=False):
        flat[position] = value
    if flat.numel() > 40:
        bits = as_bits(weight).view(-1)
        bits[where[4]] += 1  # a NaN with another payload
    return weight


def nm_mask(rows, columns, keep_n, m, seed=0):
    scores = torch.rand(rows, columns // m, m, generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(keep_n, 2).indices, True)
    return kept.reshape(rows, columns)


def expected_bits(weight, kept):
    return as_bits(weight).masked_fill(~kept, 0)


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
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1, 4), (2, 4), (4, 8), (3, 8), (2, 8), (5, 16)]))
def test_nm_is_lossless(rows, groups, pattern):
    keep_n, m = pattern
    for dtype in DTYPES:
        weight = hostile(rows, groups * m, dtype)
        kept = nm_mask(rows, groups * m, keep_n, m)
        packed = pack_nm(weight, pack_mask(kept), keep_n, m)
        assert packed.values.shape == (rows, groups * keep_n)
        assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))


def test_nm_fills_short_groups_with_positive_zero():
    weight = torch.full((1, 8), -1.0)
    kept = torch.tensor([[False, False, True, False, False, False, False, False]])
    packed = pack_nm(weight, pack_mask(kept), 2, 4)
    stored = unpack_mask(packed.bitmask, 8)[0].tolist()
    assert stored == [True, False, True, False, True, True, False, False]
    assert torch.equal(as_bits(packed.values), as_bits(torch.tensor([[0.0, -1.0, 0.0, 0.0]])))
    assert torch.equal(as_bits(packed.unpack()), expected_bits(weight, kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 192)])
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


def test_24_keeps_hostile_values():
    weight = hostile(32, 64, torch.bfloat16)
    kept = nm_mask(32, 64, 2, 4)
    assert torch.equal(as_bits(pack_24(weight, pack_mask(kept)).unpack()), expected_bits(weight, kept))


def test_to_moves_every_tensor():
    weight, kept = torch.randn(32, 64).bfloat16(), nm_mask(32, 64, 2, 4)
    mask = pack_mask(kept)
    for packed in (pack_bitmask(weight, mask), pack_nm(weight, mask, 2, 4), pack_24(weight, mask)):
        moved = packed.to("meta")
        assert moved.device.type == "meta" and moved.nbytes == packed.nbytes
        assert all(t.is_meta for t in moved._tensors().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sparse_linear_equals_the_dense_product(dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 64).to(dtype), torch.randn(32).to(dtype)
    kept = nm_mask(32, 64, 2, 4)
    mask = pack_mask(kept)
    formats = [pack_bitmask(weight, mask), pack_nm(weight, mask, 2, 4)]
    formats += [pack_24(weight, mask)] if dtype == torch.bfloat16 else []
    for packed in formats:
        for shape in ((64,), (0, 64), (3, 64), (2, 5, 64)):
            x = torch.randn(shape).to(dtype)
            expected = torch.nn.functional.linear(x, weight * kept, bias)
            assert torch.equal(sparse_linear(x, packed, bias), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w, k: pack_bitmask(w[0], k), "weight: expected floating point"),
        (lambda w, k: pack_bitmask(w, k[:, :3]), "mask: expected packed uint8"),
        (lambda w, k: pack_bitmask(w, k.bool()), "mask: expected packed uint8"),
        (lambda w, k: pack_nm(w, k, 1, 4), "mask: expected at most 1 kept of every 4"),
        (lambda w, k: pack_nm(w, k, 2, 5), "m: expected a divisor"),
        (lambda w, k: pack_nm(w, k, 5, 4), "keep_n: expected"),
        (lambda w, k: pack_24(w, k), "weight: expected bfloat16 or float16"),
        (lambda w, k: pack_24(w[:16].half(), k[:16]), "multiple of 32"),
        (lambda w, k: sparse_linear(torch.randn(3, 63), pack_bitmask(w, k)), "x: expected"),
        (lambda w, k: sparse_linear(torch.randn(3, 64), w), "packed: expected"),
        (lambda w, k: sparse_linear(torch.randn(3, 64), pack_bitmask(w, k), torch.randn(31)), "bias: expected"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(32, 64), pack_mask(nm_mask(32, 64, 2, 4)))


def test_no_backward_pass():
    packed = pack_bitmask(torch.randn(8, 8), pack_mask(torch.ones(8, 8, dtype=torch.bool)))
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference only"):
        sparse_linear(x, packed)
    with torch.no_grad():
        assert sparse_linear(x, packed).shape == (2, 8)
