"""The Triton masked-LoRA linear in the interpreter, which runs in a process of its own.

The interpreter computes bf16 wrongly, so it gets fp16 and fp32; what bf16 adds is tested on a GPU
(test_masked_lora_gpu.py) and, as machine code, in test_triton_aot.py.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.helpers.masked_lora_problems import (
    assert_error_model,
    check,
    double,
    dropout_formula,
    formula,
    implicit,
    leaves,
    merge,
    problem,
    run,
    tensors,
)

pytest.importorskip("triton")

from losa_kernels import masked_lora_linear, pack_mask, unpack_mask
from losa_kernels.masked_lora import reference
from losa_kernels.masked_lora import triton as lora
from losa_kernels.masked_lora.layer import Layer
from losa_kernels.masked_lora.triton import launch as launchers
from tests.helpers.interpreter import interpreter, run_in_interpreter, starts_interpreter

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
NEEDS_ALL = [True, True, True, True]


@starts_interpreter
def test_in_the_interpreter():
    run_in_interpreter(__file__)


# Smaller than a tile of 32 rows and 16 tokens, larger, ragged, whole.
@interpreter
@pytest.mark.parametrize(
    "shape, dtype, masked",
    [
        ((33, 41, 3), FP16, True),
        ((70, 40, 16), FP16, False),
        ((64, 96, 8), FP16, True),
        ((9, 50, 1), FP32, True),
        ((33, 24, 128), FP16, True),
        ((9, 24, 128), FP32, False),
        ((33, 41, 5), FP32, False),
    ],
)
def test_error_model(shape, dtype, masked, way):
    args = problem(*shape, tokens=18, dtype=dtype)
    check(args if masked else implicit(args), torch.randn(18, shape[0]).to(dtype), dtype)


@interpreter
@pytest.mark.parametrize("masked", [True, False])
def test_G_in_one_term(masked, monkeypatch):
    """As bf16 layers take it from the vendor's GEMM, in fp16; two spans of rows, the second ragged."""
    monkeypatch.setenv("LOSA_MASKED_LORA", "compose")
    monkeypatch.setattr(launchers, "_product_dtype", lambda dtype: dtype)
    args = problem(100, 41, 20, tokens=18, dtype=FP16)
    check(args if masked else implicit(args), torch.randn(18, 100).half(), FP16, factor_error=2**-10)


@interpreter
def test_strides(way):
    args = problem(40, 24, 4, tokens=18, dtype=FP16)
    strided = args | {
        "x": args["x"].T.contiguous().T,
        "weight": args["weight"].T.contiguous().T,
        "lora_A": torch.cat([args["lora_A"], args["lora_A"]], 1)[:, :24],
        "lora_B": args["lora_B"].T.contiguous().T,
        "mask": args["mask"].T.contiguous().T,
        "bias": torch.stack([args["bias"], args["bias"]], 1)[:, 0],
    }
    grad_y = torch.ones(40, dtype=FP16).expand(18, 40)
    expected = run(masked_lora_linear, args, grad_y.contiguous())
    inputs = {k: v.detach().requires_grad_() for k, v in strided.items() if k in ("x", "lora_A", "lora_B", "bias")}
    y = masked_lora_linear(**(strided | inputs))
    y.backward(grad_y)
    assert torch.equal(y, expected["y"])
    for name, leaf in inputs.items():
        assert torch.equal(leaf.grad, expected[name]), name


@interpreter
@pytest.mark.parametrize("shape", [(20,), (0, 20), (2, 3, 20), (2, 0, 20)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_batch_shapes(shape, p, way):
    args = problem(dtype=FP32) | {"x": torch.randn(shape)}
    inputs = args | leaves(args)
    y = masked_lora_linear(**inputs, dropout_p=p)
    assert y.shape == (*shape[:-1], 24)
    y.sum().backward()
    assert all(inputs[name].grad.shape == args[name].shape for name in ("x", "lora_A", "lora_B", "bias"))
    if 0 in shape:
        assert not inputs["lora_A"].grad.any() and not inputs["lora_B"].grad.any()


@interpreter
@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "lora_B")])
def test_subsets_of_gradients(wanted):
    args = problem(dtype=FP32)
    grad_y = torch.randn(7, 24)
    expected = run(masked_lora_linear, args, grad_y)
    inputs = leaves(args, wanted)
    masked_lora_linear(**(args | inputs)).backward(grad_y)
    for name, leaf in inputs.items():
        assert torch.equal(leaf.grad, expected[name]), name


@interpreter
@pytest.mark.parametrize("factors", [FP16, FP32])
def test_effective_weight_is_rounded_once(factors, monkeypatch):
    """x = 1 makes y^T the effective weight; all but exact ties of the last bit are fp32's rounding."""
    args = problem(40, 32, 16, dtype=FP16, bias=False) | {"x": torch.eye(32).half()}
    args |= {name: args[name].to(factors) for name in ("lora_A", "lora_B")}
    monkeypatch.setenv("LOSA_MASKED_LORA", "fused")
    exact = reference.effective_weight(Layer(*(double(args)[k] for k in Layer._fields)))
    half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-14))) - 11)
    assert ((masked_lora_linear(**args).T.double() - exact).abs() <= half_ulp * (1 + 2**-4)).all()


@interpreter
def test_factors_in_low_precision(way):
    args = problem(24, 40, 5, tokens=10, dtype=FP16)
    args |= {name: args[name].half() for name in ("lora_A", "lora_B")}
    wide = args | {name: args[name].float() for name in ("lora_A", "lora_B")}
    grad_y = torch.randn(10, 24).half()
    ours, expected = run(masked_lora_linear, args, grad_y), run(masked_lora_linear, wide, grad_y)
    for name, value in expected.items():
        assert ours[name].dtype == FP16
        error = (ours[name] - value.half()).abs().max()
        assert error <= torch.finfo(FP16).eps * value.abs().max(), name


@interpreter
def test_weight_in_another_dtype(way):
    args = problem(24, 40, 5, tokens=10, dtype=FP32)
    with torch.autocast("cpu", FP16):
        ours = masked_lora_linear(**args)
    truth, plain = formula(**double(args)), formula(**tensors(args, torch.Tensor.half) | {"mask": args["mask"]})
    error, allowed = (ours - truth).abs().max(), (plain - truth).abs().max()
    assert ours.dtype == FP16 and error <= 2 * allowed + torch.finfo(FP16).eps * truth.abs().max()


@interpreter
@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("masked", [True, False])
def test_merge(dtype, masked):
    args = problem(37, 50, 20, dtype=dtype)
    weight = args["weight"].clone()
    kept = unpack_mask(args["mask"], 50)
    if masked:
        weight[~kept] = torch.tensor(float("nan"))
        args["weight"] = weight
    else:
        args = implicit(args)
        args["weight"][~kept] = -0.0
    merged = merge(args)
    exact = merge(double(tensors(args, torch.nan_to_num)))
    assert merged.dtype == dtype and torch.equal(merged == 0, ~kept)
    assert not torch.signbit(merged[~kept]).any(), "+0.0, never -0.0"
    assert (merged.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@interpreter
@pytest.mark.parametrize(
    "way, p, change",
    [
        ("fused", 0.0, {"PARTIAL_BYTES": 1}),
        ("fused", 0.25, {"_token_splits": lambda *_: 3}),
        ("compose", 0.0, {"PARTIAL_BYTES": 1}),
        ("compose", 0.0, {"G_BYTES": 1}),
        ("compose", 0.25, {"G_BYTES": 1}),
    ],
)
def test_slices_and_splits_of_the_projection(way, p, change, monkeypatch):
    monkeypatch.setenv("LOSA_MASKED_LORA", way)
    args = problem(40, 35, 3, tokens=50, dtype=FP16)
    inputs = args["x"], Layer(*(args[k] for k in Layer._fields))
    grad_y, needs = torch.randn(50, 40).half(), [False, True, True, False]
    expected = lora.backward(grad_y, *inputs, p, 7, needs)[1:3]
    for name, value in change.items():
        monkeypatch.setattr(launchers, name, value)
    for ours, whole in zip(lora.backward(grad_y, *inputs, p, 7, needs)[1:3], expected, strict=True):
        assert (ours - whole).abs().max() <= 1e-5 * whole.abs().max()


def philox(seed: int, byte: int, row: int) -> list[int]:
    """Philox4x32-10 by its definition (Salmon et al., SC 2011)."""
    counter, key = [byte, row, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & 0xFFFFFFFF,
            (left >> 32) ^ counter[3] ^ key[1],
            left & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@interpreter
def test_dropout_is_a_function_of_seed_row_and_column():
    seed, p = 2**31 - 7, 0.3
    keep = unpack_mask(launchers.draw(21, 530, p, seed, torch.device("cpu")), 530)
    for row, column in [(0, 0), (0, 3), (0, 4), (5, 7), (20, 529), (17, 517), (16, 512)]:
        byte, bit = divmod(column, 8)
        half = philox(seed, byte, row)[bit % 4] >> (16 if bit >= 4 else 0) & 0xFFFF
        assert bool(keep[row, column]) == (half >= round(p * 65536)), (row, column)
    # Binomial with n = 11130, p = 0.7: five standard deviations are 242.
    assert abs(int(keep.sum()) - 7791) <= 242
    assert torch.equal(unpack_mask(launchers.draw(9, 100, p, seed, torch.device("cpu")), 100), keep[:9, :100])
    assert not torch.equal(unpack_mask(launchers.draw(21, 530, p, seed + 1, torch.device("cpu")), 530), keep)


@interpreter
@pytest.mark.parametrize("dtype, masked", [(FP16, True), (FP32, False)])
def test_dropout_is_on_the_adapters_input_and_replays(dtype, masked):
    """Forward and backward against the formula under the mask that the seed means."""
    args = problem(40, 35, 6, tokens=20, dtype=dtype)
    args = args if masked else implicit(args)
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()).item())
    share = 1 - round(0.3 * 65536) / 65536
    keep = unpack_mask(launchers.draw(20, 35, 0.3, seed, torch.device("cpu")), 35).double() / share
    grad_y = torch.randn(20, 40).to(dtype)
    explicit = args if masked else args | {"mask": pack_mask(args["weight"] != 0)}
    truth = run(lambda **a: dropout_formula(**a, keep=keep), double(explicit), grad_y.double())

    def plain(**a):
        narrow = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}
        return dropout_formula(**narrow, keep=keep.to(dtype))

    torch.manual_seed(5)
    ours = run(lambda **a: masked_lora_linear(**a, dropout_p=0.3), args, grad_y)
    assert_error_model(ours, run(plain, explicit, grad_y), truth, dtype)


@interpreter
def test_extreme_dropout():
    assert launchers.draw(4, 8, 1e-9, 1, torch.device("cpu")) is None
    args = problem(dtype=FP32)
    assert torch.equal(masked_lora_linear(**args, dropout_p=1e-9), masked_lora_linear(**args))
    assert torch.isfinite(masked_lora_linear(**args, dropout_p=1 - 1e-9)).all()


@interpreter
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_composed_weight_lives_as_long_as_its_call(p, monkeypatch):
    """What outlives a call would be freed, or written to by another layer, under a captured graph that uses it."""
    monkeypatch.setenv("LOSA_MASKED_LORA", "compose")
    args = problem(24, 20, dtype=FP16)
    made, empty = [], torch.empty

    def recorded(*shape, **options):
        tensor = empty(*shape, **options)
        made.append((tuple(tensor.shape), weakref.ref(tensor.untyped_storage())))
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    inputs = args | leaves(args)
    y = masked_lora_linear(**inputs, dropout_p=p)
    y.backward(torch.ones(7, 24, dtype=FP16))
    gc.collect()
    composed = [storage for shape, storage in made if shape == (24, 20)]
    assert len(composed) == 2 and all(storage() is None for storage in composed)


@interpreter
def test_fused_keeps_no_matrix_of_the_weights_size(monkeypatch):
    """Every tensor that the launchers allocate."""
    monkeypatch.setenv("LOSA_MASKED_LORA", "fused")
    monkeypatch.setattr(launchers, "PARTIAL_BYTES", 1)
    args = problem(128, 96, 1, tokens=2, dtype=FP16)
    allocated, allocate = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocated.append(allocate(*a, **k)) or allocated[-1])
    run(masked_lora_linear, args, torch.randn(2, 128).half())
    largest = max(tensor.numel() * tensor.element_size() for tensor in allocated)
    assert largest == 16 * 128 * 2, "the padded terms of a factor, 16 components of 128 features"


@interpreter
def test_fp64_goes_to_the_reference():
    args = problem()
    ours = run(masked_lora_linear, args, torch.ones(7, 24, dtype=torch.float64))
    expected = run(formula, args, torch.ones(7, 24, dtype=torch.float64))
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-12, atol=1e-12), name
    assert merge(args).dtype == torch.float64
