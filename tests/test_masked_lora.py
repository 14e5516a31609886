"""Masked-LoRA linear against an explicit fp64 formula and torch.autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from losa_kernels import masked_lora, masked_lora_linear, merge_masked_lora, pack_mask, unpack_mask
from losa_kernels.masked_lora import cpu
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


def tensors(args, change):
    return {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def double(args):
    return tensors(args, lambda t: t.double() if t.is_floating_point() else t)


def assert_error_model(ours, plain, truth, dtype):
    """At most twice plain torch's error in the same precision, plus one rounding of the largest value."""
    for name, value in truth.items():
        error = (ours[name].double() - value).abs().max()
        allowed = 2 * (plain[name].double() - value).abs().max() + torch.finfo(dtype).eps * value.abs().max()
        assert error <= allowed, (name, error, allowed)
        assert ours[name].dtype == (dtype if name in ("y", "x", "bias") else torch.float32)


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


@pytest.mark.parametrize("dtype, product", [(d, p) for d in LOW for p in (d, torch.float32)][1:])
def test_cpu_products_in_their_own_or_a_wider_dtype(dtype, product, monkeypatch):
    """Which of the two a CPU gets depends on its instruction set."""
    monkeypatch.setattr(cpu, "product_dtype", lambda _: product)
    args = problem(70, 50, 8, tokens=16, dtype=dtype)
    grad_y = torch.randn(16, 70).to(dtype)
    truth = run(formula, double(args), grad_y.double())
    assert_error_model(run(masked_lora_linear, args, grad_y), run(formula, args, grad_y), truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("change", [{}, {"bias": None}, {"dropout_p": 0.3}, {"mask": None}])
def test_panels(dtype, change, monkeypatch):
    """Panels and blocks of 64 rows or columns, the last one partial, against one panel."""
    args = problem(150, 205, 5, dtype=dtype) | change
    grad_y = torch.randn(7, 150).to(dtype)
    torch.manual_seed(0)
    whole, merged = run(masked_lora_linear, args, grad_y), merge(args)
    monkeypatch.setattr(cpu, "PANEL", 1)
    monkeypatch.setattr(cpu, "BLOCK", 1)
    torch.manual_seed(0)
    for name, value in run(masked_lora_linear, args, grad_y).items():
        allowed = torch.finfo(dtype if name in ("y", "x") else value.dtype).eps * 8 * value.abs().max()
        assert (value - whole[name]).abs().max() <= allowed, name
    assert torch.equal(merge(args), merged)


def merge(args):
    return merge_masked_lora(*(args[k] for k in ("weight", "mask", "lora_A", "lora_B", "scaling")))


def test_adapter_in_the_dtype_of_x():
    args = problem(dtype=torch.bfloat16)
    args |= {k: args[k].bfloat16() for k in ("lora_A", "lora_B")}
    grad_y = torch.randn(7, 24).bfloat16()
    wide = args | {k: args[k].float() for k in ("lora_A", "lora_B")}
    ours, expected = run(masked_lora_linear, args, grad_y), run(masked_lora_linear, wide, grad_y)
    for name, value in expected.items():
        assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], value.bfloat16()), name


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


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("wanted", [("x", "lora_A", "lora_B", "bias"), ("lora_B",), ("x",), ("bias",)])
def test_backward_saves_x_once_and_references(wanted, dropout_p):
    args = problem(96, 80, 8, tokens=32, dtype=torch.float32) | {"dropout_p": dropout_p}
    inputs = args | leaves(args, wanted)
    known = {v.data_ptr() for v in inputs.values() if isinstance(v, torch.Tensor)}
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_lora_linear(**inputs)
    needs_x = "lora_A" in wanted or "lora_B" in wanted
    assert [t.data_ptr() for t in saved].count(inputs["x"].data_ptr()) == needs_x, "x: once, and only if it is needed"
    new = [t for t in saved if t.data_ptr() not in known]
    assert [t.shape for t in new] == ([torch.Size()] if dropout_p else []), "only the seed is kept besides references"


class Products(TorchDispatchMode):
    """Multiply-adds of all matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wanted, forms, large, small",
    [
        # Large: x W_eff^T, dX, G. Small, one rank wide: B A for each W_eff, then dA, dB.
        (("x", "lora_A", "lora_B", "bias"), 2, 3, 2),
        (("lora_A", "lora_B"), 1, 2, 2),
        (("x", "lora_A"), 2, 3, 1),
        (("lora_B",), 1, 2, 1),
        (("x",), 2, 2, 0),
        (("bias",), 1, 1, 0),
    ],
)
def test_no_product_is_wasted(wanted, forms, large, small):
    args = problem(64, 48, 3, tokens=40, dtype=torch.float32)
    inputs = args | leaves(args, wanted)
    with Products() as products:
        masked_lora_linear(**inputs).sum().backward()
    assert products.count == 64 * 48 * (40 * large + 3 * (forms + small))


def test_dropout_costs_two_more_products():
    args = problem(64, 48, 3, tokens=40, dtype=torch.float32) | {"dropout_p": 0.5}
    inputs = args | leaves(args)
    with Products() as products:
        masked_lora_linear(**inputs).sum().backward()
    assert products.count == 64 * 48 * (40 * 5 + 3 * (2 + 2))


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


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_pruned_values_reach_no_result(dropout_p):
    args = problem() | {"dropout_p": dropout_p}
    kept = unpack_mask(args["mask"], 20)
    hostile = args["weight"].masked_fill(~kept, float("nan"))
    grad_y = torch.randn(7, 24, dtype=torch.float64)
    torch.manual_seed(0)
    expected = run(masked_lora_linear, args, grad_y)
    torch.manual_seed(0)
    for name, value in run(masked_lora_linear, args | {"weight": hostile}, grad_y).items():
        assert torch.equal(value, expected[name]), name


def test_zeros_of_a_kept_weight_adapt_and_of_a_pruned_one_do_not():
    args = problem()
    weight = args["weight"].clone()
    weight[0, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    full = pack_mask(torch.ones(24, 20, dtype=torch.bool))
    dense = merge(args | {"weight": weight, "mask": full})
    assert bool((dense[0, :4] != 0).all()), "an explicit mask keeps what happens to be zero"
    derived = merge(args | {"weight": weight, "mask": None})
    assert bool((derived[0, :4].view(torch.int64) == 0).all()), "mask None prunes W == 0, -0.0 too, to +0.0"
    assert torch.equal(derived[1:], dense[1:])


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


def test_inference_mode():
    args = problem(dtype=torch.float32)
    expected = masked_lora_linear(**args)
    with torch.inference_mode():
        assert torch.equal(masked_lora_linear(**args), expected)


def test_meta_tensors_have_shapes():
    args = tensors(problem(dtype=torch.bfloat16), lambda t: t.to("meta"))
    y = masked_lora_linear(**args)
    assert (y.shape, y.dtype, y.device.type) == ((7, 24), torch.bfloat16, "meta")


def test_autocast_casts_x_only():
    """x = 1 makes y^T the effective weight: composed in fp32 and rounded once, not composed in bf16."""
    args = problem(dtype=torch.float32, bias=False) | {"x": torch.eye(20)}
    expected = merge(args).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_lora_linear(**args)
        merged = merge(args)
        wide = masked_lora_linear(**double(args))
    assert torch.equal(y.T, expected)
    assert merged.dtype == torch.float32 and torch.equal(merged.bfloat16(), expected)
    assert wide.dtype == torch.float64


def test_backward_within_autocast():
    args = problem(dtype=torch.float32)
    grads = []
    for inside in (False, True):
        inputs = leaves(args)
        with torch.autocast("cpu", torch.bfloat16):
            y = masked_lora_linear(**(args | inputs))
            if inside:
                y.backward(torch.ones_like(y))
        if not inside:
            y.backward(torch.ones_like(y))
        grads.append({k: v.grad for k, v in inputs.items()})
    for name, value in grads[0].items():
        assert value.dtype == torch.float32 and torch.equal(grads[1][name], value), name


def test_second_derivatives_are_refused():
    args = problem()
    inputs = leaves(args)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(masked_lora_linear(**(args | inputs)).sum(), inputs["x"], create_graph=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(bias, needs_grad):
    args = problem(9, 10, 2, dtype=torch.float32, bias=bias)
    inputs = args | (leaves(args) if needs_grad else {})
    order = ("x", "weight", "mask", "lora_A", "lora_B", "scaling", "bias")
    torch.library.opcheck(masked_lora._forward_op, (*(inputs[k] for k in order), 0.0, None))


@pytest.mark.parametrize("needs", [(True, True, True, True), (True, False, False, False), (False, False, True, True)])
def test_opcheck_backward(needs):
    args = problem(9, 10, 2, dtype=torch.bfloat16)
    rest = [args[k] for k in ("weight", "mask", "lora_A", "lora_B", "scaling")]
    x = args["x"] if needs[1] or needs[2] else None
    grad_y = torch.randn(7, 9).bfloat16()
    torch.library.opcheck(masked_lora._backward_op, (grad_y, x, *rest, 0.2, torch.tensor(3), list(needs)))


def test_compile_makes_one_graph():
    args = problem(dtype=torch.float32) | {"dropout_p": 0.1}
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def model(x):
        hidden = masked_lora_linear(**(args | {"x": x}))
        return masked_lora_linear(**(args | {"x": hidden.relu()[:, :20]})).sum()

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.manual_seed(0)
    expected = model(args["x"])
    torch.manual_seed(0)
    assert torch.equal(compiled(args["x"]), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "change, autocast", [({}, False), ({"dropout_p": 0.3}, False), ({"mask": None, "bias": None}, False), ({}, True)]
)
def test_compiled_training_gives_the_same_gradients(change, autocast):
    args = problem(dtype=torch.float32) | change
    grad_y = torch.randn(7, 24)

    def model(**inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return masked_lora_linear(**inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    ours = run(compiled, args, grad_y)
    torch.manual_seed(0)
    for name, value in run(model, args, grad_y).items():
        assert torch.equal(ours[name], value), name


def test_compiled_checkpointing():
    args = problem(dtype=torch.float32)
    grad_y = torch.randn(7, 24)
    torch._dynamo.reset()

    def model(**inputs):
        return checkpoint(lambda: masked_lora_linear(**inputs), use_reentrant=False)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
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
