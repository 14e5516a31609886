"""The grouped masked-LoRA linear by Triton: in the interpreter, which runs in a process of its own and gets fp16, and
in bf16 on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from losa_kernels.grouped_masked_lora import groups as limits
from losa_kernels.grouped_masked_lora import one_by_one
from losa_kernels.grouped_masked_lora import triton as grouped
from tests.helpers.grouped_problems import by_formula, by_op, doubled, grouped_problem, moved, run_grouped
from tests.helpers.interpreter import interpreter, run_in_interpreter, starts_interpreter
from tests.helpers.masked_lora_problems import assert_error_model

SIZES = [40, 0, 1, 70, 17]


@starts_interpreter
def test_in_the_interpreter():
    run_in_interpreter(__file__)


def check(args, dtype, device="cpu"):
    """As good as plain torch in the same precision, by an fp64 formula."""
    grad_y = torch.randn(len(args["x"]), args["weight"][0].shape[0]).to(dtype)
    truth = run_grouped(by_formula, doubled(args), grad_y.double())
    plain = run_grouped(by_formula, args, grad_y)
    ours = run_grouped(by_op, moved(args, device), grad_y.to(device))
    assert_error_model({name: value.cpu() for name, value in ours.items()}, plain, truth, dtype)
    rest = sum(SIZES)
    assert not ours["y"][rest:].any() and not ours["x"][rest:].any(), "rows of no group"
    assert not any(ours[name].any() for name in ours if name.endswith(".1")), "a group without rows"


def in_a_stack(args):
    """Weights that lie in one tensor, at equal distances, as gate and up projections do."""
    stack = torch.stack([torch.cat([weight, weight]) for weight in args["weight"]])
    return args | {"weight": [both[: len(both) // 2] for both in stack]}


@pytest.fixture
def one_after_another(monkeypatch):
    """How often groups were computed one after another."""
    calls = []
    for name in ("forward", "backward"):
        own = getattr(one_by_one, name)
        monkeypatch.setattr(one_by_one, name, lambda *a, own=own: calls.append(1) or own(*a))
    return calls


# What changes against three components, (24, 24) weights, biases, and rows of no group; whether a grouped GEMM runs.
PROBLEMS = [
    ({}, True),
    ({"ranks": [1, 16, 3, 5, 2], "bias": False, "extra": 0}, True),
    ({"out_features": 72, "in_features": 40}, True),
    ({"ranks": [3, 17, 3, 3, 3]}, False),
    ({"in_features": 20}, False),
]


@interpreter
@pytest.mark.parametrize("changes, together", PROBLEMS, ids=str)
def test_error_model(changes, together, one_after_another):
    args = grouped_problem(SIZES, dtype=torch.float16, **{"in_features": 24, **changes})
    check(args, torch.float16)
    assert len(one_after_another) == (0 if together else 2)


@interpreter
def test_fp32_and_no_rows_go_one_after_another(one_after_another):
    check(grouped_problem(SIZES, dtype=torch.float32, in_features=24), torch.float32)
    assert len(one_after_another) == 2
    none = grouped_problem([0, 0], dtype=torch.float16, extra=0)
    found = run_grouped(by_op, none, torch.zeros(0, 24).half())
    assert found["y"].shape == (0, 24) and not found["lora_A.0"].any()


@interpreter
def test_a_stack_is_composed_in_parts_of_few_bytes(monkeypatch):
    """Parts of two groups: the first has rows in one, the second in both, the third is one group."""
    args = grouped_problem(SIZES, dtype=torch.float16, in_features=24)
    grad_y = torch.randn(len(args["x"]), 24).half()
    whole = run_grouped(by_op, args, grad_y)
    monkeypatch.setattr(limits, "STACK_BYTES", 2 * 2 * 24 * 24)
    parts = run_grouped(by_op, args, grad_y)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    none = grouped_problem([0, 0, 0, 30, 0], dtype=torch.float16, in_features=24, extra=0)
    check_zero = run_grouped(by_op, none, torch.ones(30, 24).half())
    assert not check_zero["lora_A.0"].any() and check_zero["lora_A.3"].any()


def off_by_one(matrix):
    """The same numbers, in memory that does not begin at 16 bytes."""
    buffer = matrix.new_empty(matrix.numel() + 1)[1:].view_as(matrix)
    return buffer.copy_(matrix)


def turned(matrix):
    return matrix.T.contiguous().T


# Layouts of x and dY that torch's grouped GEMM does not take: all rows one row, an odd place in memory, columns first.
LAYOUTS = {
    "expanded": lambda t: t[:1].expand(len(t), -1),
    "odd": off_by_one,
    "turned": turned,
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


def check_layout(layout, sizes, dtype, device):
    args = moved(grouped_problem(sizes, dtype=dtype, in_features=24), device)
    x, grad_y = args["x"], torch.randn(len(args["x"]), 24, device=device).to(dtype)
    given = args | {"x": LAYOUTS[layout](x), "ends": args["ends"].to(torch.int32)}
    dense = args | {"x": given["x"].clone(memory_format=torch.contiguous_format)}
    gradient = LAYOUTS[layout](grad_y)
    found, expected = run_grouped(by_op, given, gradient), run_grouped(by_op, dense, gradient.clone())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [SIZES, [1]])
def test_any_layout_of_rows(layout, sizes):
    check_layout(layout, sizes, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [SIZES, [1]])
def test_any_layout_of_rows_on_a_gpu(layout, sizes):
    check_layout(layout, sizes, torch.bfloat16, "cuda")


@interpreter
def test_what_rows_of_no_group_hold_reaches_nothing():
    args, rest = grouped_problem(SIZES, dtype=torch.float16, in_features=24), sum(SIZES)
    grad_y = torch.randn(len(args["x"]), 24).half()
    clean = run_grouped(by_op, args, grad_y)
    args["x"][rest:], grad_y[rest:] = float("nan"), float("inf")
    dirty = run_grouped(by_op, args, grad_y)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@interpreter
def test_weights_in_one_stack_are_not_copied():
    args = in_a_stack(grouped_problem(SIZES, dtype=torch.float16, in_features=24))
    stack = grouped._stacked(args["weight"])
    assert stack.data_ptr() == args["weight"][0].data_ptr() and stack.stride() == (48 * 24, 24, 1)
    assert all(torch.equal(one, other) for one, other in zip(stack, args["weight"], strict=True))
    shuffled = [args["weight"][i] for i in (0, 2, 1)]
    assert torch.equal(grouped._stacked(shuffled), torch.stack(shuffled))
    check(args, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("changes, together", PROBLEMS, ids=str)
@pytest.mark.parametrize("stack_bytes", [4 << 30, 2 * 2 * 24 * 24])
def test_error_model_on_a_gpu(changes, together, stack_bytes, one_after_another, monkeypatch):
    monkeypatch.setattr(limits, "STACK_BYTES", stack_bytes)
    args = grouped_problem(SIZES, dtype=torch.bfloat16, **{"in_features": 24, **changes})
    check(args, torch.bfloat16, "cuda")
    assert len(one_after_another) == (0 if together else 2)


@pytest.mark.gpu
def test_a_large_mixture_on_a_gpu():
    """Qwen3-30B-A3B's gate projections: 128 experts, of which the last ten have no rows, beside each group's own."""
    sizes = [64] * 100 + [1] * 18 + [0] * 10
    args = moved(grouped_problem(sizes, 768, 2048, [8] * 128, torch.bfloat16, bias=False), "cuda")
    grad_y = torch.randn(len(args["x"]), 768, device="cuda").bfloat16()
    truth, ours = run_grouped(by_formula, doubled(args), grad_y.double()), run_grouped(by_op, args, grad_y)
    plain = run_grouped(by_formula, args, grad_y)
    assert_error_model(ours, plain, truth, torch.bfloat16)


@pytest.mark.gpu
def test_the_host_waits_for_nothing(monkeypatch):
    args = moved(grouped_problem(SIZES, 64, 64, dtype=torch.bfloat16), "cuda")
    grad_y = torch.ones(len(args["x"]), 64, device="cuda").bfloat16()
    run_grouped(by_op, args, grad_y)  # kernels are chosen by time
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_grouped(by_op, args, grad_y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
