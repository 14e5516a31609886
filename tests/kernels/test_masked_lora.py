"""Masked-LoRA linear against an explicit fp64 formula and torch.autograd."""

from __future__ import annotations

import math

import pytest
import torch

from losa_kernels import masked_lora_linear, pack_mask, unpack_mask
from losa_kernels.masked_lora.reference import dropout_keep
from losa_kernels.tensors import as_bits
from tests.helpers.masked_lora_problems import (
    LOW,
    SHAPES,
    assert_error_model,
    close,
    double,
    dropout_formula,
    formula,
    merge,
    problem,
    run,
    tensors,
)


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request, monkeypatch):
    """Every test runs on the implementation a user gets and on the reference."""
    monkeypatch.setenv("LOSA_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
def test_fp64_is_the_formula(shape, masked):
    args = problem(*shape)
    if not masked:
        args["weight"] = args["weight"] * unpack_mask(args["mask"], shape[1])
        args["mask"] = None
    grad_y = torch.randn(7, shape[0], dtype=torch.float64)
    ours, expected = run(masked_lora_linear, args, grad_y), run(formula, args, grad_y)
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-12 * value.abs().max().item()), name


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_error_model(dtype, shape, device):
    args = tensors(problem(*shape, tokens=16, dtype=dtype), lambda t: t.to(device))
    grad_y = torch.randn(16, shape[0], device=device).to(dtype)
    truth = run(formula, double(args), grad_y.double())
    assert_error_model(run(masked_lora_linear, args, grad_y), run(formula, args, grad_y), truth, dtype)


def test_adapter_in_the_dtype_of_x():
    args = problem(dtype=torch.bfloat16)
    args |= {k: args[k].bfloat16() for k in ("lora_A", "lora_B")}
    grad_y = torch.randn(7, 24).bfloat16()
    wide = args | {k: args[k].float() for k in ("lora_A", "lora_B")}
    ours, expected = run(masked_lora_linear, args, grad_y), run(masked_lora_linear, wide, grad_y)
    for name, value in expected.items():
        assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], value.bfloat16()), name


@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 3, 20), (2, 0, 3, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_batch_shape(shape, dtype):
    args = problem(dtype=dtype) | {"x": torch.randn(shape, dtype=dtype, requires_grad=True)}
    y = masked_lora_linear(**args)
    assert y.shape == (*shape[:-1], 24)
    assert y.numel() == 0 or close(y, formula(**args))
    y.sum().backward()
    assert args["x"].grad.shape == shape


@pytest.mark.parametrize("tokens", [7, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strided_inputs(dtype, tokens):
    args = problem(tokens=tokens, dtype=dtype)
    expected = run(formula, args, torch.ones(tokens, 24, dtype=dtype))
    strided = {
        "x": args["x"].T.contiguous().T,
        "weight": args["weight"].T.contiguous().T,
        "lora_A": torch.cat([args["lora_A"], args["lora_A"]], 1)[:, :20],
        "lora_B": args["lora_B"].T.contiguous().T,
        "mask": torch.cat([args["mask"], args["mask"]], 1)[:, :3],
        "bias": args["bias"].repeat_interleave(2)[::2],
    }
    inputs = {k: v.detach().requires_grad_() for k, v in strided.items() if k not in ("mask", "weight")}
    y = masked_lora_linear(**(args | strided | inputs))
    y.backward(torch.ones(24, dtype=dtype).expand(tokens, 24))
    assert close(y, expected["y"])
    for name, leaf in inputs.items():
        assert close(leaf.grad, expected[name]), name


def test_nothing_given_is_written_to():
    args = problem() | {"dropout_p": 0.2}
    before = tensors(args, torch.clone)
    run(masked_lora_linear, args, torch.randn(7, 24))
    merge(args)
    assert all(torch.equal(args[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))


def test_products_wider_than_fp16():
    """G beyond 65504, as under loss scaling, where A and B and their gradients are fp32."""
    args = problem(dtype=torch.float16) | {"x": torch.full((7, 20), 100.0).half()}
    grad_y = torch.full((7, 24), 300.0)
    expected = run(formula, double(args), grad_y.double())
    ours = run(masked_lora_linear, args, grad_y)
    for name in ("lora_A", "lora_B"):
        assert torch.allclose(ours[name].double(), expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max())


def test_merge_is_exact_and_safe():
    args = problem(dtype=torch.bfloat16)
    kept = unpack_mask(args["mask"], 20)
    weight = args["weight"].clone()
    weight[~kept] = torch.tensor([float("nan"), float("inf"), -0.0, -1.0])[
        torch.arange(int((~kept).sum())) % 4
    ].bfloat16()
    merged = merge(args | {"weight": weight})
    assert bool((merged.view(torch.int16)[~kept] == 0).all()), "pruned weights must be +0.0 to the bit"
    exact = weight.double() + 2.0 * args["lora_B"].double() @ args["lora_A"].double()
    # One rounding to bf16 (half a unit in the last place), and fp32 sums over the rank before it.
    allowed = (
        exact.abs() * torch.finfo(torch.bfloat16).eps / 2
        + 16 * torch.finfo(torch.float32).eps * exact[kept].abs().max()
    )
    assert bool(((merged.double() - exact).abs() <= allowed)[kept].all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_pruned_values_reach_no_result(dropout_p, dtype):
    args = problem(dtype=dtype) | {"dropout_p": dropout_p}
    kept = unpack_mask(args["mask"], 20)
    hostile = args["weight"].masked_fill(~kept, float("nan"))
    grad_y = torch.randn(7, 24, dtype=dtype)
    torch.manual_seed(0)
    expected = run(masked_lora_linear, args, grad_y)
    torch.manual_seed(0)
    for name, value in run(masked_lora_linear, args | {"weight": hostile}, grad_y).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zeros_of_a_kept_weight_adapt_and_of_a_pruned_one_do_not(dtype):
    args = problem(dtype=dtype)
    weight = args["weight"].clone()
    weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    full = pack_mask(torch.ones(24, 20, dtype=torch.bool))
    dense = merge(args | {"weight": weight, "mask": full})
    assert bool((dense[0, :4] != 0).all()), "an explicit mask keeps what happens to be zero"
    derived = merge(args | {"weight": weight, "mask": None})
    assert bool((as_bits(derived[0, :4]) == 0).all()), "mask None prunes W == 0, -0.0 too, to +0.0"
    assert torch.equal(derived[1:], dense[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_is_on_the_adapters_input_and_replays(dtype):
    args = problem(tokens=50, dtype=dtype)
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**31 - 1, ()).item())
    keep = dropout_keep(args["x"], 0.3, seed)
    expected = run(lambda **a: dropout_formula(**a, keep=keep), args, torch.ones(50, 24, dtype=dtype))
    torch.manual_seed(5)
    ours = run(lambda **a: masked_lora_linear(**a, dropout_p=0.3), args, torch.ones(50, 24, dtype=dtype))
    for name, value in expected.items():
        assert close(ours[name], value), name
    values, counts = keep.unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([0, 1 / 0.7], dtype=dtype))
    # Binomial with n = 1000, p = 0.7: five standard deviations are 73.
    assert abs(int(counts[1]) - 700) <= 73
    again = masked_lora_linear(**args, dropout_p=0.3)
    assert not torch.equal(again, ours["y"]), "every call draws a new mask"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(3, 19)}, "x: expected"),
        ({"x": torch.ones(3, 20, dtype=torch.int64)}, "x: expected"),
        ({"weight": torch.randn(24)}, "weight: expected"),
        ({"weight": torch.randn(0, 20), "lora_B": torch.randn(0, 4)}, "weight: expected"),
        ({"mask": torch.zeros(24, 2, dtype=torch.uint8)}, "mask: expected packed uint8"),
        ({"mask": torch.zeros(24, 20, dtype=torch.bool)}, "mask: expected packed uint8"),
        ({"lora_A": torch.randn(129, 20)}, "lora_A: expected"),
        ({"lora_A": torch.randn(4, 21)}, "lora_A: expected"),
        ({"lora_A": torch.randn(4, 20).half()}, "lora_A: expected float32"),
        ({"lora_B": torch.randn(24, 5)}, "lora_B: expected"),
        ({"x": torch.tensor(1.0)}, "x: expected"),
        ({"x": torch.randn(3, 20).bfloat16()}, "x: expected the weight's dtype"),
        ({"x": torch.randn(3, 20, device="meta")}, "x: expected on cpu"),
        ({"weight": torch.ones(24, 20, dtype=torch.int8)}, "weight: expected"),
        ({"mask": torch.zeros(24, 3, dtype=torch.uint8, device="meta")}, "mask: expected on cpu"),
        ({"lora_A": torch.randn(0, 20), "lora_B": torch.randn(24, 0)}, "lora_A: expected"),
        ({"lora_B": torch.randn(24, 4).double()}, "lora_B: expected float32"),
        ({"scaling": math.nan}, "scaling: expected"),
        ({"scaling": -math.inf}, "scaling: expected"),
        ({"bias": torch.randn(23)}, "bias: expected"),
        ({"bias": torch.ones(24, dtype=torch.int32)}, "bias: expected"),
        ({"dropout_p": 1.0}, "dropout_p: expected"),
        ({"dropout_p": math.nan}, "dropout_p: expected"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        masked_lora_linear(**(problem(dtype=torch.float32) | change))


def test_merge_errors_name_the_argument():
    args = problem(dtype=torch.bfloat16)
    for change, message in (
        ({"mask": args["mask"].bool()}, "mask: expected"),
        ({"lora_A": args["lora_A"].half()}, "lora_A: expected float32"),
        ({"scaling": math.inf}, "scaling: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(args | change)
