"""The Triton masked-LoRA linear on a GPU: what bf16 and the hardware add to the interpreter's tests."""

from __future__ import annotations

import pytest
import torch
from masked_lora_problems import (
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

from losa_kernels import masked_lora_linear, unpack_mask
from losa_kernels.masked_lora import triton as lora
from losa_kernels.masked_lora import triton_launch, tuning

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.gpu


def on_gpu(args):
    return tensors(args, lambda tensor: tensor.cuda())


def factor_error(way, dtype):
    """The vendor's GEMM rounds G to bf16, and its parts where it divides the sum, as for any gradient in torch."""
    return torch.finfo(BF16).eps if way == "compose" and dtype == BF16 else 2**-13


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(577, 583, 7), (512, 1024, 16), (192, 576, 8), (1040, 592, 64), (256, 256, 128)])
@pytest.mark.parametrize("tokens", [1, 50, 300])
def test_error_model(dtype, masked, shape, tokens, way):
    args = on_gpu(problem(*shape, tokens=tokens, dtype=dtype))
    grad_y = torch.randn(tokens, shape[0], device="cuda").to(dtype)
    check(args if masked else implicit(args), grad_y, dtype, factor_error(way, dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_tile(dtype, way, monkeypatch):
    """What the tuner may choose, not only what it does."""
    args = on_gpu(problem(256, 512, 16, tokens=600, dtype=dtype))
    grad_y = torch.randn(600, 256, device="cuda").to(dtype)
    for index in range(3):
        monkeypatch.setattr(tuning, "tuned", lambda key, tiles, device, run, i=index: tiles[min(i, len(tiles) - 1)])
        check(args, grad_y, dtype, factor_error(way, dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dropout(dtype, way):
    args = on_gpu(problem(192, 320, 8, tokens=100, dtype=dtype))
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()).item())
    share = 1 - round(0.1 * 65536) / 65536
    keep = unpack_mask(triton_launch.draw(100, 320, 0.1, seed, torch.device("cuda")), 320).double() / share
    grad_y = torch.randn(100, 192, device="cuda").to(dtype)
    truth = run(lambda **a: dropout_formula(**a, keep=keep), double(args), grad_y.double())

    def plain(**a):
        narrow = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}
        return dropout_formula(**narrow, keep=keep.to(dtype))

    torch.manual_seed(5)
    ours = run(lambda **a: masked_lora_linear(**a, dropout_p=0.1), args, grad_y)
    assert_error_model(ours, run(plain, args, grad_y), truth, dtype)


def test_runs_repeat_bit_for_bit(way):
    args = on_gpu(problem(512, 768, 16, tokens=1000, dtype=BF16))
    grad_y = torch.randn(1000, 512, device="cuda").bfloat16()
    first = run(masked_lora_linear, args, grad_y)
    for _ in range(3):
        for name, value in run(masked_lora_linear, args, grad_y).items():
            assert torch.equal(value, first[name]), name


def test_products_wider_than_fp16(way):
    """G beyond 65504, as under loss scaling."""
    args = on_gpu(problem(dtype=FP16)) | {"x": torch.full((7, 20), 100.0, device="cuda").half()}
    grad_y = torch.full((7, 24), 300.0, device="cuda").half()
    expected = run(formula, double(args), grad_y.double())
    ours = run(masked_lora_linear, args, grad_y)
    for name in ("lora_A", "lora_B"):
        error = (ours[name].double() - expected[name]).abs().max()
        assert error <= 2**-13 * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_merge(dtype):
    args = on_gpu(problem(300, 500, 20, dtype=dtype))
    kept = unpack_mask(args["mask"], 500)
    merged, exact = merge(args), merge(double(args))
    assert torch.equal(merged == 0, ~kept) and not torch.signbit(merged[~kept]).any()
    assert (merged.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_peak_memory_of_a_step(monkeypatch):
    """Nothing of W's size beyond what the caller gets: shares of dA and dB, and G in slices."""
    args = on_gpu(problem(8192, 8192, 16, tokens=256, dtype=BF16, bias=False))
    monkeypatch.setattr(triton_launch, "G_BYTES", 16 << 20)
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    grad_y = torch.randn(256, 8192, device="cuda").bfloat16()
    inputs = args | leaves(args)
    for name, limit in (("fused", 0.5), ("compose", 1.5)):
        monkeypatch.setenv("LOSA_MASKED_LORA", name)
        lora.free_scratch()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        masked_lora_linear(**inputs).backward(grad_y)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= limit * args["weight"].numel() * 2, name


@pytest.mark.sanitizer
def test_tiny_step_for_the_sanitizer(way):
    args = on_gpu(problem(33, 41, 3, tokens=5, dtype=BF16))
    inputs = leaves(args)
    masked_lora_linear(**(args | inputs), dropout_p=0.1).sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in inputs.values())
