"""Products with packed weights are the dense product's, to within what the dense product itself is wrong by."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from losa_kernels import pack_24, pack_bitmask, pack_mask, pack_nm, sparse_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
HALF = torch.tensor([True, False, False, True] * 16).expand(32, 64)


def assert_close(ours, x, weight, bias):
    """err(ours) <= 2 err(plain torch in this precision) + one rounding, against fp64."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = linear(x, weight, bias)
    assert ours.dtype == x.dtype and ours.shape == exact.shape
    if exact.numel():
        rounding = torch.finfo(x.dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_is_the_dense_product(dtype, device):
    weight, mask, bias = WEIGHT.to(device, dtype), pack_mask(HALF.to(device)), torch.randn(32).to(device, dtype)
    dense = weight.masked_fill(~HALF.to(device), 0)
    formats = [pack_bitmask(weight, mask), pack_nm(weight, mask, 2, 4)]
    formats += [pack_24(weight, mask)] if weight.element_size() == 2 else []
    for packed in formats:
        for shape in ((64,), (0, 64), (1, 64), (3, 64), (2, 5, 64), (17, 64)):
            x = torch.randn(shape).to(device, dtype)
            assert_close(sparse_linear(x, packed, bias), x, dense, bias)
            assert_close(sparse_linear(x, packed), x, dense, None)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 5), st.floats(0, 1), st.integers(0, 99))
def test_any_shape_and_density(rows, columns, batch, density, seed):
    g = torch.Generator().manual_seed(seed)
    weight, kept = torch.randn(rows, columns, generator=g), torch.rand(rows, columns, generator=g) < density
    x = torch.randn(batch, columns, generator=g)
    packed = pack_bitmask(weight, pack_mask(kept))
    assert_close(sparse_linear(x, packed), x, weight.masked_fill(~kept, 0), None)


def test_pruned_places_never_reach_the_product():
    weight = WEIGHT.masked_fill(~HALF, float("nan"))
    packed = pack_bitmask(weight, pack_mask(HALF))
    x = torch.randn(3, 64)
    assert_close(sparse_linear(x, packed), x, WEIGHT.masked_fill(~HALF, 0), None)


def test_strided_input():
    packed, x = pack_bitmask(WEIGHT, pack_mask(HALF)), torch.randn(64, 6).T[::2]
    assert not x.is_contiguous()
    assert_close(sparse_linear(x, packed), x, WEIGHT.masked_fill(~HALF, 0), None)


def test_the_product_runs_in_the_inputs_dtype():
    packed = pack_bitmask(WEIGHT.bfloat16(), pack_mask(HALF))
    x, bias = torch.randn(4, 64), torch.randn(32).bfloat16()
    dense = WEIGHT.bfloat16().float().masked_fill(~HALF, 0)
    assert_close(sparse_linear(x, packed, bias), x, dense, bias.float())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: sparse_linear(torch.randn(3, 63), p), r"x: expected floating point \(..., 64\), got .* \(3, 63\)"),
        (lambda p: sparse_linear(torch.ones(3, 64, dtype=torch.int64), p), "x: expected floating point"),
        (lambda p: sparse_linear(torch.tensor(1.0), p), "x: expected floating point"),
        (lambda p: sparse_linear(torch.randn(3, 64, device="meta"), p), "x: expected on cpu as packed, got meta"),
        (lambda p: sparse_linear(torch.randn(3, 64), p.unpack()), "packed: expected a packed weight, got Tensor"),
        (lambda p: sparse_linear(torch.randn(3, 64), p, torch.randn(31)), r"bias: expected \(32,\), got \(31,\)"),
        (lambda p: sparse_linear(torch.randn(3, 64), p, torch.randn(32, device="meta")), "bias: expected on cpu"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(pack_bitmask(WEIGHT, pack_mask(HALF)))


@pytest.mark.parametrize("name", ["x", "bias"])
def test_no_backward_pass(name):
    packed = pack_bitmask(WEIGHT, pack_mask(HALF))
    x, bias = (torch.randn(size, requires_grad=name == n) for n, size in (("x", (2, 64)), ("bias", (32,))))
    with pytest.raises(RuntimeError, match=f"^{name}: requires a gradient, but sparse_linear is for inference only"):
        sparse_linear(x, packed, bias)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not sparse_linear(x, packed, bias).requires_grad
