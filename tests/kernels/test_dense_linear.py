"""dense_linear: the kernels of packed weights with a weight of which nothing is pruned, and when torch takes over."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from losa_kernels import dense_linear, dispatch, native
from losa_kernels.dense_linear import cpu

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(rows, columns, batch, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(*shape, generator=generator) for shape in ((batch, columns), (rows, columns), (rows,)))
    return [tensor.to(dtype) for tensor in made]


def assert_close(found, x, weight, bias):
    """fp32 sums, rounded once: an error of a few fp32 roundings of the largest products, and of half a last bit."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    eps = torch.finfo(torch.float32).eps
    allowed = 8 * eps * size + (torch.finfo(found.dtype).eps * exact.abs() if found.dtype.itemsize < 4 else 0)
    assert found.dtype == x.dtype and bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns, rows", [(1, 3), (7, 1), (40, 7), (64, 33), (100, 6), (576, 130), (5000, 19)])
def test_each_instruction_set(isa, dtype, columns, rows, poisoned_native_memory):
    """Widths around what a register, a mask word and a chunk hold; the operator itself, for every number of rows."""
    for batch in (1, 2, 3, 4, 8, 16):
        x, weight, bias = problem(rows, columns, batch, dtype)
        for own in (None, bias):
            assert_close(torch.ops.losa.dense_linear.default(x, weight, own), x, weight, own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_next_row_is_not_read_into_a_row(isa, dtype):
    """Columns beyond a row's last ones are the next row's first ones in memory."""
    x, weight, _ = problem(5, 70, 2, dtype)
    weight[1::2] = torch.inf
    found = torch.ops.losa.dense_linear.default(x, weight, None)
    assert_close(found[:, ::2], x, weight[::2], None)
    assert not found[:, 1::2].isfinite().any()


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("lead", [(), (1,), (2,), (3,), (4,), (2, 6), (13,), (40,), (0,)])
def test_public_function(dtype, lead):
    _, weight, bias = problem(9, 24, 1, dtype)
    x = torch.randn(*lead, 24).to(dtype)
    for own in (None, bias):
        found = dense_linear(x, weight, own)
        assert found.shape == (*lead, 9)
        assert_close(found, x, weight, own)
    # As a matrix is: columns apart, rows apart.
    wide = torch.randn(3, 48).to(dtype)[:, ::2]
    assert_close(dense_linear(wide, weight.T.contiguous().T, bias), wide, weight, bias)


def test_who_multiplies(monkeypatch):
    """Two vectors of bf16 where the CPU multiplies these itself, 16 where it does not; some of others; no fp64."""
    seen = []
    monkeypatch.setattr(cpu, "_few_rows", lambda x, weight, bias: seen.append(len(x)) or linear(x, weight, bias))

    def served(dtype: torch.dtype) -> list[int]:
        seen.clear()
        for batch in range(20):
            x, weight, _ = problem(3, 8, batch, dtype)
            dense_linear(x, weight)
        return list(seen)

    for own, most in ((True, 2), (False, 16)):
        monkeypatch.setattr(cpu, "cpu_has_bf16", lambda own=own: own)
        monkeypatch.setitem(cpu.SERVED, torch.bfloat16, cpu._rows(torch.bfloat16))
        assert served(torch.bfloat16) == list(range(1, most + 1))
    assert served(torch.float16) == [1, 2, 3, 4]
    assert served(torch.float32) == list(range(4, 13)) and served(torch.float64) == []
    assert dispatch.implementation("dense_linear", torch.device("cpu")) is cpu.dense_linear


def test_weights_of_nothing():
    for shape in ((0, 8), (4, 0), (0, 0)):
        weight, bias = torch.zeros(shape).bfloat16(), torch.ones(shape[0]).bfloat16()
        for batch in (0, 1, 5):
            x = torch.ones(batch, shape[1]).bfloat16()
            assert torch.equal(dense_linear(x, weight, bias), bias.expand(batch, shape[0]))


def test_bad_arguments():
    x, weight, bias = torch.ones(2, 8), torch.ones(3, 8), torch.ones(3)
    for name, given, message in (
        ("weight", (x, torch.ones(8), bias), r"weight: expected \(out, in\), got \(8,\)"),
        ("dtype", (x.int(), weight.int(), None), "weight: expected bf16, fp16, fp32 or fp64, got torch.int32"),
        ("x", (torch.ones(2, 7), weight, bias), r"x: expected \(..., 8\), got \(2, 7\)"),
        ("bias", (x, weight, torch.ones(4)), r"bias: expected \(3,\), got \(4,\)"),
        ("mixed", (x.bfloat16(), weight, bias), "x: expected torch.float32 as weight, got torch.bfloat16"),
        ("device", (x, weight, bias.to("meta")), "bias: expected on cpu as weight, got meta"),
        ("type", (x, [1.0], bias), "weight: expected a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_linear(*given), name
    with pytest.raises(RuntimeError, match="weight: requires a gradient, but dense_linear is for inference only"):
        dense_linear(x, weight.requires_grad_(), bias)
    with torch.no_grad():
        assert not dense_linear(x, weight, bias).requires_grad


def test_compiled():
    x, weight, bias = problem(9, 24, 1, torch.bfloat16)
    compiled = torch.compile(dense_linear, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, bias), dense_linear(x, weight, bias))
