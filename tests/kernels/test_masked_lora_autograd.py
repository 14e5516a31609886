"""Masked-LoRA linear in autograd, autocast, checkpoints and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from losa_kernels import masked_lora, masked_lora_linear, native
from tests.helpers.masked_lora_problems import close, double, formula, leaves, merge, problem, run, tensors


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request, monkeypatch):
    """Every test runs on the implementation a user gets and on the reference."""
    monkeypatch.setenv("LOSA_BACKEND", request.param)
    return request.param


def test_gradcheck():
    args = problem(5, 6, 2, tokens=3)
    inputs = leaves(args)
    names = list(inputs)

    def call(*values):
        return masked_lora_linear(**(args | dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def sliced(y, other):
    y[..., 1:9] += other[..., 1:9]
    return y


def sliced_elsewhere(y, other):
    return torch.cat([y[..., :1], y[..., 1:9] + other[..., 1:9], y[..., 9:]], -1)


EDITS = {  # in place, and the same out of place
    "add_": (lambda y, other: y.add_(other), lambda y, other: y + other),
    "clamp_": (lambda y, other: y.clamp_(-0.5, 0.5), lambda y, other: y.clamp(-0.5, 0.5)),
    "mul_": (lambda y, other: y.mul_(other), lambda y, other: y * other),
    "+= of a slice": (sliced, sliced_elsewhere),
    "of a view": (lambda y, other: (y.view(-1, 2).mul_(3), y)[1], lambda y, other: y * 3),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 20), (0, 20), (1, 1, 1, 20)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_outputs_may_be_changed_in_place(edit, shape, dropout_p):
    args = problem(dtype=torch.float32) | {"x": torch.randn(shape), "dropout_p": dropout_p}
    other, results = torch.randn(*shape[:-1], 24), []
    for form in EDITS[edit]:
        torch.manual_seed(1)
        inputs = leaves(args)
        x = inputs["x"] * 1  # no leaf, as in a model
        y = form(masked_lora_linear(**(args | inputs | {"x": x})), other)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in inputs.values())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_outputs_of_no_grad_may_be_changed_where_gradients_are_enabled():
    args, other = problem(dtype=torch.float32), torch.randn(7, 24, requires_grad=True)
    with torch.no_grad():
        y = masked_lora_linear(**args)
    y.add_(other).sum().backward()
    assert torch.equal(other.grad, torch.ones(7, 24))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_trains_whose_output_is_changed_in_place(compiled):
    """A block like Llama 4's (add_ on the shared expert's output) and OLMo's (clamp_ of queries)."""
    torch.compiler.reset()
    args, other = problem(dtype=torch.float32), torch.randn(7, 24)
    results = []
    for name in (0, 1):
        inputs = leaves(args)

        def block(inputs, name=name):
            y = masked_lora_linear(**(args | inputs))
            return EDITS["clamp_"][name](EDITS["add_"][name](y, other), other).square().sum()

        run_block = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
        run_block(inputs).backward()
        results.append([leaf.grad for leaf in inputs.values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "lora_B"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_subset_of_gradients(wanted, dtype):
    args = problem(dtype=dtype)
    grad_y = torch.randn(7, 24, dtype=dtype)
    expected = run(formula, args, grad_y)
    inputs = leaves(args, wanted)
    masked_lora_linear(**(args | inputs)).backward(grad_y)
    for name, leaf in inputs.items():
        assert close(leaf.grad, expected[name]), name


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


def runs_natively(backend):
    return backend == "auto" and native.missing("cpu") is None


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
        # Large: x W_eff^T, dX, G. Small, one rank wide, inside the kernels where they are native: B A for each W_eff,
        # then dA, dB.
        (("x", "lora_A", "lora_B", "bias"), 2, 3, 2),
        (("lora_A", "lora_B"), 1, 2, 2),
        (("x", "lora_A"), 2, 3, 1),
        (("lora_B",), 1, 2, 1),
        (("x",), 2, 2, 0),
        (("bias",), 1, 1, 0),
    ],
)
def test_no_product_is_wasted(backend, wanted, forms, large, small):
    args = problem(64, 48, 3, tokens=40, dtype=torch.float32)
    inputs = args | leaves(args, wanted)
    with Products() as products:
        masked_lora_linear(**inputs).sum().backward()
    rank = 0 if runs_natively(backend) else 3
    assert products.count == 64 * 48 * (40 * large + rank * (forms + small))


def test_dropout_costs_two_more_products(backend):
    args = problem(64, 48, 3, tokens=40, dtype=torch.float32) | {"dropout_p": 0.5}
    inputs = args | leaves(args)
    with Products() as products:
        masked_lora_linear(**inputs).sum().backward()
    rank = 0 if runs_natively(backend) else 3
    assert products.count == 64 * 48 * (40 * 5 + rank * (2 + 2))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_checkpointing_gives_the_same_gradients(dropout, dtype):
    args = problem(dtype=dtype) | {"dropout_p": dropout}
    grad_y = torch.randn(7, 24, dtype=dtype)
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


def test_fake_tensors_have_shapes_and_leave_nothing_behind():
    args = problem(dtype=torch.float32) | {"dropout_p": 0.2}
    torch.manual_seed(0)
    expected = run(masked_lora_linear, args, torch.ones(7, 24))
    with FakeTensorMode() as mode:
        fake = run(masked_lora_linear, tensors(args, mode.from_tensor), torch.ones(7, 24))
    assert {k: (v.shape, v.dtype) for k, v in fake.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    assert all(isinstance(v, FakeTensor) for v in fake.values())
    torch.manual_seed(0)
    for name, value in run(masked_lora_linear, args, torch.ones(7, 24)).items():
        assert torch.equal(value, expected[name]), name


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
