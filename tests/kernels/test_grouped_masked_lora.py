"""The grouped masked-LoRA linear against its formula, group by group, in fp64."""

from __future__ import annotations

import pytest
import torch

from losa_kernels import grouped_masked_lora_linear, masked_lora_linear, native, pack_mask
from losa_kernels.masked_lora import cpu, cpu_sparse
from tests.helpers.grouped_problems import by_formula, by_op, doubled, grouped_problem, run_grouped
from tests.helpers.masked_lora_problems import LOW, assert_error_model

SIZES = [40, 0, 1, 150, 17]
BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "cpu" and native.missing("cpu"):
        pytest.skip(native.missing("cpu"))
    monkeypatch.setenv("LOSA_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("most_kept", [1.0, -1.0])
@pytest.mark.parametrize("changes", [{}, {"bias": False, "extra": 0}, {"ranks": [1, 20, 3, 5, 2]}], ids=str)
def test_it_is_as_good_as_its_formula(backend, dtype, most_kept, changes, monkeypatch):
    """By sparse products and by dense ones; a group without rows among the others, rows of no group behind them."""
    monkeypatch.setattr(cpu_sparse, "MOST_KEPT", most_kept)
    args = grouped_problem(SIZES, dtype=dtype, **changes)
    grad_y = torch.randn(len(args["x"]), 24).to(dtype)
    truth = run_grouped(by_formula, doubled(args), grad_y.double())
    ours = run_grouped(by_op, args, grad_y)
    assert_error_model(ours, run_grouped(by_formula, args, grad_y), truth, dtype)
    rest = sum(SIZES)
    assert not ours["y"][rest:].any() and not ours["x"][rest:].any()
    assert not any(ours[name].any() for name in ours if name.endswith(".1"))


def test_fp64_is_exact(backend):
    args = grouped_problem(SIZES, dtype=torch.float64)
    grad_y = torch.randn(len(args["x"]), 24, dtype=torch.float64)
    truth, ours = (run_grouped(f, args, grad_y) for f in (by_formula, by_op))
    for name, value in truth.items():
        assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-12), name


@pytest.mark.skipif(native.missing("cpu") is not None, reason="the native CPU library is not built")
def test_rows_get_the_bits_of_their_own_linear(isa, monkeypatch):
    """Rows of other groups change nothing of y and dX, and the number of threads changes nothing at all."""
    monkeypatch.setattr(cpu_sparse, "FEWEST_TOKENS", 0)
    monkeypatch.setattr(cpu_sparse, "FEWEST_OF_A_GROUP", 0)
    args = grouped_problem(SIZES, out_features=200, in_features=130, ranks=[4, 4, 128, 1, 8])
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run_grouped(by_op, args, torch.ones(len(args["x"]), 200)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    start = 0
    for group, size in enumerate(SIZES):
        layer = [args[name][group] for name in ("weight", "mask", "lora_A", "lora_B")]
        alone = masked_lora_linear(args["x"][start : start + size], *layer, args["scaling"], args["bias"][group])
        assert torch.equal(results[0]["y"][start : start + size], alone)
        start += size


@pytest.mark.parametrize("most_kept", [1.0, -1.0])
def test_what_rows_of_no_group_hold_reaches_nothing(backend, most_kept, monkeypatch):
    monkeypatch.setattr(cpu_sparse, "MOST_KEPT", most_kept)
    args, rest = grouped_problem(SIZES), sum(SIZES)
    grad_y = torch.randn(len(args["x"]), 24)
    clean = run_grouped(by_op, args, grad_y)
    args["x"][rest:], grad_y[rest:] = float("nan"), float("inf")
    dirty = run_grouped(by_op, args, grad_y)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.skipif(native.missing("cpu") is not None, reason="the native CPU library is not built")
@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "bias"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("most_kept", [1.0, -1.0])
def test_gradients_that_nobody_asks_for_are_left_out(needs, most_kept, monkeypatch):
    monkeypatch.setattr(cpu_sparse, "MOST_KEPT", most_kept)
    args = grouped_problem(SIZES)
    whole = run_grouped(by_op, args, torch.ones(len(args["x"]), 24))
    leaves = []
    for name in needs:
        leaves += [(name, args[name])] if name == "x" else [(f"{name}.{i}", t) for i, t in enumerate(args[name])]
    for _, leaf in leaves:
        leaf.requires_grad_()
    by_op(args).sum().backward()
    for name, leaf in leaves:
        assert torch.equal(leaf.grad, whole[name]), name
    others = [t for name in ("lora_A", "lora_B", "bias") if name not in needs for t in args[name]]
    assert all(t.grad is None for t in others)


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_a_bf16_layer_multiplies_in_what_the_cpu_has(product, monkeypatch):
    """Where that is fp32, sparse products make the gradients of factors, and dense ones the others."""
    if native.missing("cpu"):
        pytest.skip(native.missing("cpu"))
    monkeypatch.setattr(cpu, "product_dtype", lambda _: product)
    monkeypatch.setattr(cpu_sparse, "MOST_KEPT", 1.0)
    args = grouped_problem(SIZES, dtype=torch.bfloat16)
    grad_y = torch.randn(len(args["x"]), 24).bfloat16()
    truth = run_grouped(by_formula, doubled(args), grad_y.double())
    assert_error_model(run_grouped(by_op, args, grad_y), run_grouped(by_formula, args, grad_y), truth, torch.bfloat16)


def test_under_autocast_x_is_cast():
    args = grouped_problem(SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        y = by_op(args)
    low = by_op(args | {name: [t.bfloat16() for t in args[name]] for name in ("weight",)} | {"x": args["x"].bfloat16()})
    assert y.dtype == torch.bfloat16
    # Weights are rounded once, after the adapter was added in fp32.
    assert (y.double() - low.double()).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * low.abs().max().double()


def test_stacked_tensors_are_taken_apart():
    """As transformers holds experts; gradients come back in the stacks."""
    args = grouped_problem(SIZES)
    names = ("weight", "mask", "lora_A", "lora_B", "bias")
    stacked = args | {name: torch.stack(args[name]) for name in names}
    grad_y = torch.randn(len(args["x"]), 24)
    expected = run_grouped(by_op, args, grad_y)
    for name in ("lora_A", "lora_B", "bias"):
        stacked[name].requires_grad_()
    y = by_op(stacked)
    y.backward(grad_y)
    assert torch.equal(y, expected["y"])
    for name in ("lora_A", "lora_B", "bias"):
        assert torch.equal(stacked[name].grad, torch.stack([expected[f"{name}.{i}"] for i in range(len(SIZES))]))


def test_no_second_derivatives():
    args = grouped_problem([3], extra=0)
    args["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(by_op(args).sum(), args["x"], create_graph=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": []}, "^weights: expected at least one group"),
        ({"weights": None}, "^weights: expected a sequence of tensors, got None"),
        ({"masks": [None, None]}, r"^masks\[0\]: expected a tensor, got None"),
        (
            {
                "weights": [torch.zeros(4, 8), torch.zeros(5, 8)],
                "masks": [torch.zeros(n, 1, dtype=torch.uint8) for n in (4, 5)],
                "lora_B": [torch.zeros(n, 2) for n in (4, 5)],
            },
            r"^weights\[1\]: expected torch.float32 \(4, 8\) on cpu as weights\[0\]",
        ),
        ({"masks": []}, "^masks: expected 2 tensors, one for each weight, got 0"),
        ({"biases": [torch.zeros(4)]}, "^biases: expected 2 tensors"),
        ({"biases": [torch.zeros(4), torch.zeros(5)]}, r"^biases\[1\]: expected floating point \(4,\)"),
        ({"weights": [torch.zeros(4, 8), torch.zeros(4, 9)]}, r"^lora_A\[1\]: expected \(r, 9\)"),
        ({"weights": [torch.zeros(4, 8), torch.zeros(5, 8)]}, r"^lora_B\[1\]: expected \(5, 2\)"),
        ({"lora_A": [torch.zeros(2, 8), torch.zeros(0, 8)]}, r"^lora_A\[1\]: expected"),
        ({"x": torch.zeros(2, 3, 8)}, r"^x: expected \(rows, in\)"),
        ({"x": torch.zeros(5, 7)}, "^x: expected"),
        ({"ends": torch.tensor([3])}, r"^ends: expected int32 or int64 \(2,\)"),
        ({"ends": torch.tensor([3.0, 5.0])}, "^ends: expected int32"),
        ({"ends": torch.tensor([3, 6])}, "^ends: expected numbers from 0 to 5"),
        ({"ends": torch.tensor([3, 2])}, "^ends: expected .* none less"),
        ({"ends": torch.tensor([-1, 2])}, "^ends: expected numbers"),
        ({"ends": torch.tensor([3, 5], device="meta")}, "^ends: expected a tensor with data"),
        (
            {"weights": [torch.zeros(4, 8), torch.zeros(4, 8).half()]},
            r"^weights\[1\]: expected torch.float32 \(4, 8\) on cpu as",
        ),
        ({"scaling": float("nan")}, "^scaling: "),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {
        "x": torch.zeros(5, 8),
        "ends": torch.tensor([3, 5]),
        "weights": [torch.zeros(4, 8)] * 2,
        "masks": [pack_mask(torch.ones(4, 8, dtype=torch.bool))] * 2,
        "lora_A": [torch.zeros(2, 8)] * 2,
        "lora_B": [torch.zeros(4, 2)] * 2,
        "scaling": 2.0,
    }
    assert grouped_masked_lora_linear(**arguments).shape == (5, 4)
    with pytest.raises(ValueError, match=message):
        grouped_masked_lora_linear(**(arguments | changes))
