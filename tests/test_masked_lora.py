"""Masked-LoRA linear against an explicit fp64 formula and torch.autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from losa_kernels import masked_lora, masked_lora_linear, merge_masked_lora, pack_mask, unpack_mask
from losa_kernels.masked_lora.reference import dropout_keep

SHAPES = [(17, 33, 1), (33, 17, 3), (64, 40, 8), (130, 129, 128)]
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request, monkeypatch):
    """Every test runs on the implementation a user gets and on the reference."""
    monkeypatch.setenv("LOSA_BACKEND", request.param)


def problem(out_features=24, in_features=20, rank=4, tokens=7, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(tokens, in_features).to(dtype),
        "weight": normal(out_features, in_features).to(dtype),
        "mask": pack_mask(torch.rand(out_features, in_features, generator=g) > 0.6),
        "lora_A": (normal(rank, in_features) / in_features**0.5).to(adapter),
        "lora_B": (normal(out_features, rank) / rank**0.5).to(adapter),
        "scaling": 2.0,
        "bias": normal(out_features).to(dtype) if bias else None,
    }


def leaves(args, names=("x", "lora_A", "lora_B", "bias")):
    return {k: args[k].detach().clone().requires_grad_() for k in names if args[k] is not None}


def formula(x, weight, mask, lora_A, lora_B, scaling, bias=None):
    """What the paper writes, in the arguments' own dtype."""
    kept = weight != 0 if mask is None else unpack_mask(mask, weight.shape[1])
    effective = (weight + scaling * (lora_B @ lora_A).to(weight.dtype)) * kept
    return F.linear(x, effective, bias)


def run(function, args, grad_y):
    inputs = leaves(args)
    y = function(**(args | inputs))
    y.backward(grad_y.to(y.dtype))
    return {"y": y.detach(), **{k: v.grad for k, v in inputs.items()}}


def double(args):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}


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
def test_low_precision_error_model(dtype, shape):
    """At most twice plain torch's error in the same precision, plus one rounding of the largest value."""
    args = problem(*shape, tokens=16, dtype=dtype)
    grad_y = torch.randn(16, shape[0]).to(dtype)
    truth = run(formula, double(args), grad_y.double())
    ours, plain = run(masked_lora_linear, args, grad_y), run(formula, args, grad_y)
    for name, value in truth.items():
        error = (ours[name].double() - value).abs().max()
        allowed = 2 * (plain[name].double() - value).abs().max() + torch.finfo(dtype).eps * value.abs().max()
        assert error <= allowed, (name, error, allowed)
        assert ours[name].dtype == (dtype if name in ("y", "x", "bias") else torch.float32)


def test_gradcheck():
    args = problem(5, 6, 2, tokens=3)
    inputs = leaves(args)
    names = list(inputs)

    def call(*values):
        return masked_lora_linear(**(args | dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "lora_B"), ("lora_A", "lora_B")])
def test_any_subset_of_gradients(wanted):
    args = problem()
    grad_y = torch.randn(7, 24, dtype=torch.float64)
    expected = run(formula, args, grad_y)
    inputs = leaves(args, wanted)
    masked_lora_linear(**(args | inputs)).backward(grad_y)
    for name, leaf in inputs.items():
        assert torch.allclose(leaf.grad, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 3, 20), (2, 0, 3, 20)])
def test_any_batch_shape(shape):
    args = problem() | {"x": torch.randn(shape, dtype=torch.float64, requires_grad=True)}
    y = masked_lora_linear(**args)
    assert y.shape == (*shape[:-1], 24)
    assert torch.allclose(y, formula(**args))
    y.sum().backward()
    assert args["x"].grad.shape == shape


def test_strided_inputs():
    args = problem()
    expected = run(formula, args, torch.ones(7, 24, dtype=torch.float64))
    strided = {
        "x": args["x"].T.contiguous().T,
        "weight": args["weight"].T.contiguous().T,
        "lora_A": torch.cat([args["lora_A"], args["lora_A"]], 1)[:, :20],
        "lora_B": args["lora_B"].T.contiguous().T,
        "mask": torch.cat([args["mask"], args["mask"]], 1)[:, :3],
    }
    inputs = {k: v.detach().requires_grad_() for k, v in strided.items() if k not in ("mask", "weight")}
    y = masked_lora_linear(**(args | strided | inputs))
    y.backward(torch.ones(24, dtype=torch.float64).expand(7, 24))
    assert torch.allclose(y, expected["y"])
    for name, leaf in inputs.items():
        assert torch.allclose(leaf.grad, expected[name]), name


def test_backward_saves_x_once_and_references():
    args = problem(96, 80, 8, tokens=32, dtype=torch.float32) | {"dropout_p": 0.1}
    inputs = leaves(args)
    known = {v.data_ptr() for v in (args | inputs).values() if isinstance(v, torch.Tensor)}
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_lora_linear(**(args | inputs))
    assert [t.data_ptr() for t in saved].count(inputs["x"].data_ptr()) == 1
    assert all(t.data_ptr() in known for t in saved), "something new is kept for the backward pass"


def test_merge_is_exact_and_safe():
    args = problem(dtype=torch.bfloat16)
    kept = unpack_mask(args["mask"], 20)
    weight = args["weight"].clone()
    weight[~kept] = torch.tensor([float("nan"), float("inf"), -0.0, -1.0])[
        torch.arange(int((~kept).sum())) % 4
    ].bfloat16()
    merged = merge_masked_lora(weight, args["mask"], args["lora_A"], args["lora_B"], 2.0)
    assert bool((merged.view(torch.int16)[~kept] == 0).all()), "pruned weights must be +0.0 to the bit"
    exact = weight.double() + 2.0 * args["lora_B"].double() @ args["lora_A"].double()
    # One rounding to bf16 (half a unit in the last place), and fp32 sums over the rank before it.
    allowed = (
        exact.abs() * torch.finfo(torch.bfloat16).eps / 2
        + 16 * torch.finfo(torch.float32).eps * exact[kept].abs().max()
    )
    assert bool(((merged.double() - exact).abs() <= allowed)[kept].all())


def test_pruned_values_never_reach_the_output():
    args = problem()
    kept = unpack_mask(args["mask"], 20)
    hostile = torch.where(kept, args["weight"], torch.full_like(args["weight"], float("nan")))
    assert torch.equal(masked_lora_linear(**(args | {"weight": hostile})), masked_lora_linear(**args))


def dropout_formula(x, weight, mask, lora_A, lora_B, scaling, bias, keep):
    kept = unpack_mask(mask, weight.shape[1])
    return F.linear(x, weight * kept, bias) + F.linear(x * keep, scaling * (lora_B @ lora_A) * kept)


def test_dropout_is_on_the_adapters_input_and_replays():
    args = problem(tokens=50)
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**31 - 1, ()).item())
    keep = dropout_keep(args["x"], 0.3, seed)
    expected = run(lambda **a: dropout_formula(**a, keep=keep), args, torch.ones(50, 24, dtype=torch.float64))
    torch.manual_seed(5)
    ours = run(lambda **a: masked_lora_linear(**a, dropout_p=0.3), args, torch.ones(50, 24, dtype=torch.float64))
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-12), name
    values, counts = keep.unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([0, 1 / 0.7], dtype=torch.float64))
    # Binomial with n = 1000, p = 0.7: five standard deviations are 73.
    assert abs(int(counts[1]) - 700) <= 73
    again = masked_lora_linear(**args, dropout_p=0.3)
    assert not torch.equal(again, ours["y"]), "every call draws a new mask"


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_gives_the_same_gradients(dropout):
    args = problem() | {"dropout_p": dropout}
    grad_y = torch.randn(7, 24, dtype=torch.float64)
    torch.manual_seed(1)
    expected = run(masked_lora_linear, args, grad_y)
    torch.manual_seed(1)
    again = run(lambda **a: checkpoint(lambda: masked_lora_linear(**a), use_reentrant=False), args, grad_y)
    for name, value in expected.items():
        assert torch.equal(again[name], value), name


def test_one_layer_twice_in_a_graph():
    args = problem(20, 20)
    grad_y = torch.randn(7, 20, dtype=torch.float64)

    def twice(function):
        def call(x, **rest):
            return function(function(x, **rest), **rest)

        return call

    ours, expected = run(twice(masked_lora_linear), args, grad_y), run(twice(formula), args, grad_y)
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-10, atol=1e-10), name


def test_inference_mode_and_autocast():
    args = problem(dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(masked_lora_linear(**args), masked_lora_linear(**args))
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_lora_linear(**args)
    assert y.dtype == torch.bfloat16
    assert (y.double() - formula(**double(args))).abs().max() <= 0.05 * y.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(bias, needs_grad):
    args = problem(9, 10, 2, dtype=torch.float32, bias=bias)
    inputs = args | (leaves(args) if needs_grad else {})
    order = ("x", "weight", "mask", "lora_A", "lora_B", "scaling", "bias")
    torch.library.opcheck(masked_lora._forward, (*(inputs[k] for k in order), 0.0, 0))


def test_compile_makes_one_graph():
    args = problem(dtype=torch.float32)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def model(x):
        hidden = masked_lora_linear(**(args | {"x": x}))
        return hidden.relu().sum()

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(args["x"]), model(args["x"]))
    assert len(graphs) == 1


def test_compiled_training_gives_the_same_gradients():
    args = problem(dtype=torch.float32)
    grad_y = torch.randn(7, 24)
    torch._dynamo.reset()
    compiled = torch.compile(masked_lora_linear, backend="aot_eager", fullgraph=True)
    ours, expected = run(compiled, args, grad_y), run(masked_lora_linear, args, grad_y)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(3, 19)}, "x: expected"),
        ({"x": torch.ones(3, 20, dtype=torch.int64)}, "x: expected"),
        ({"weight": torch.randn(24)}, "weight: expected"),
        ({"mask": torch.zeros(24, 2, dtype=torch.uint8)}, "mask: expected packed uint8"),
        ({"mask": torch.zeros(24, 20, dtype=torch.bool)}, "mask: expected packed uint8"),
        ({"lora_A": torch.randn(129, 20)}, "lora_A: expected"),
        ({"lora_A": torch.randn(4, 21)}, "lora_A: expected"),
        ({"lora_A": torch.randn(4, 20).half()}, "lora_A: expected float32"),
        ({"lora_B": torch.randn(24, 5)}, "lora_B: expected"),
        ({"scaling": float("nan")}, "scaling: expected"),
        ({"bias": torch.randn(23)}, "bias: expected"),
        ({"dropout_p": 1.0}, "dropout_p: expected"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        masked_lora_linear(**(problem(dtype=torch.float32) | change))
