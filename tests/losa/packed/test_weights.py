"""One weight in the format that suits it, and rows of packed weights."""

from __future__ import annotations

import pytest
import torch

from losa.packed.weights import pack_weight
from losa_kernels.packing import PackedBitmask, PackedNM
from losa_kernels.packing.rows import join_rows, take_rows
from losa_kernels.tensors import as_bits


def test_zeros_of_either_sign_are_dropped():
    weight = torch.tensor([[0.0, -0.0, 1.5, 0.0, float("inf"), 0.0, 0.0, -2.0]])
    packed = pack_weight(weight, "bitmask")
    assert packed.values.tolist() == [1.5, float("inf"), -2.0]
    assert torch.equal(as_bits(packed.unpack()), as_bits(weight + 0.0))


@pytest.mark.parametrize(
    ("groups", "pattern"),
    [([0, 1], (2, 4)), ([1], (1, 4)), ([0, 1, 2, 3], (4, 8)), ([2, 3, 7], (3, 8)), ([0, 1, 2, 3, 4], (5, 8))],
)
def test_patterns_are_found(groups, pattern):
    weight = torch.zeros(4, 32)
    keep_n, m = pattern
    period = [c for c in range(32) if c % (m if (m == 4 or max(groups) < m) else 8) in groups]
    weight[:, period] = torch.randn(4, len(period))
    packed = pack_weight(weight)
    assert isinstance(packed, PackedNM) and (packed.keep_n, packed.m) == pattern
    assert torch.equal(packed.unpack(), weight)


def test_irregular_weights_take_a_bitmask():
    weight = torch.randn(16, 64) * (torch.rand(16, 64) > 0.6)
    assert isinstance(pack_weight(weight), PackedBitmask)
    assert isinstance(pack_weight(weight, "nm"), PackedNM)
    with pytest.raises(ValueError, match="format: expected one of auto, bitmask, nm, got 'csr'"):
        pack_weight(weight, "csr")


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_rows_join_and_part(format):
    weights = [torch.randn(rows, 16) * (torch.rand(rows, 16) > 0.5) for rows in (3, 1, 4)]
    for weight in weights:
        weight[0, :8] = 1  # the same pattern for all
    parts = [pack_weight(weight, format) for weight in weights]
    whole = join_rows(parts)
    assert torch.equal(whole.unpack(), torch.cat(weights))
    assert torch.equal(take_rows(whole, 3, 8).unpack(), torch.cat(weights[1:]))
    assert take_rows(whole, 8, 8).unpack().shape == (0, 16)
    with pytest.raises(ValueError, match="start, stop: expected"):
        take_rows(whole, 3, 9)
    with pytest.raises(ValueError, match="of one kind, got 2"):
        join_rows([parts[0], pack_weight(torch.ones(2, 8), format)])
