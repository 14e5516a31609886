"""The Triton masked-LoRA linear on a GPU: what bf16 and the hardware add to the interpreter's tests."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.helpers.masked_lora_problems import (
    assert_error_model,
    check,
    close,
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

from triton.runtime.errors import OutOfResources

from losa_kernels import masked_lora_linear, measured, unpack_mask
from losa_kernels.masked_lora.triton import launch as launchers
from losa_kernels.masked_lora.triton import tuning

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
    """What the tuner may choose, not only what it does; tiles that the device has no room for give way to the next."""
    args = on_gpu(problem(256, 512, 16, tokens=600, dtype=dtype))
    grad_y = torch.randn(600, 256, device="cuda").to(dtype)
    for index in range(3):

        def tuned(op, key, tiles, device, run, index=index):
            for tile in (*tiles[index:], *reversed(tiles)):
                try:
                    return run(tile)
                except OutOfResources as error:
                    last = error
            raise last

        monkeypatch.setattr(tuning, "tuned", tuned)
        check(args, grad_y, dtype, factor_error(way, dtype))


def test_the_measured_ways_and_tiles_are_right(monkeypatch):
    monkeypatch.delenv("LOSA_MASKED_LORA", raising=False)
    monkeypatch.delenv("LOSA_AUTOTUNE", raising=False)
    measured.forget()
    args = on_gpu(problem(256, 512, 16, tokens=600, dtype=BF16))
    check(args, torch.randn(600, 256, device="cuda").bfloat16(), BF16, torch.finfo(BF16).eps)
    found = {choice.op: choice for choice in measured.choices()}
    assert {f"masked LoRA, {op}" for op in ("forward", "gradient of x", "gradients of A and B", "product")} <= set(
        found
    )
    for choice in found.values():
        assert min(choice.times.values()) == choice.times[choice.chosen] < float("inf"), choice


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dropout(dtype, way):
    args = on_gpu(problem(192, 320, 8, tokens=100, dtype=dtype))
    torch.manual_seed(5)
    seed = int(torch.randint(2**31 - 1, ()).item())
    share = 1 - round(0.1 * 65536) / 65536
    keep = unpack_mask(launchers.draw(100, 320, 0.1, seed, torch.device("cuda")), 320).double() / share
    grad_y = torch.randn(100, 192, device="cuda").to(dtype)
    truth = run(lambda **a: dropout_formula(**a, keep=keep), double(args), grad_y.double())

    def plain(**a):
        narrow = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}
        return dropout_formula(**narrow, keep=keep.to(dtype))

    torch.manual_seed(5)
    ours = run(lambda **a: masked_lora_linear(**a, dropout_p=0.1), args, grad_y)
    assert_error_model(ours, run(plain, args, grad_y), truth, dtype)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_runs_repeat_bit_for_bit(way, p):
    """In torch's deterministic mode, where cuBLAS wants a workspace of a fixed size."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        pytest.skip("CUBLAS_WORKSPACE_CONFIG is not set")
    args = on_gpu(problem(512, 768, 16, tokens=1000, dtype=BF16))
    grad_y = torch.randn(1000, 512, device="cuda").bfloat16()

    def step():
        torch.manual_seed(5)
        return run(lambda **a: masked_lora_linear(**a, dropout_p=p), args, grad_y)

    torch.use_deterministic_algorithms(True)
    try:
        first = step()
        for _ in range(3):
            for name, value in step().items():
                assert torch.equal(value, first[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


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
    monkeypatch.setattr(launchers, "G_BYTES", 16 << 20)
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    grad_y = torch.randn(256, 8192, device="cuda").bfloat16()
    inputs = args | leaves(args)
    for name, p, limit in (("fused", 0.0, 0.5), ("fused", 0.1, 0.5), ("compose", 0.0, 1.5), ("compose", 0.1, 2.5)):
        monkeypatch.setenv("LOSA_MASKED_LORA", name)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        masked_lora_linear(**inputs, dropout_p=p).backward(grad_y)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= limit * args["weight"].numel() * 2, (name, p)


def test_compiled_with_cuda_graphs(way, monkeypatch):
    """Three steps by torch.compile's graphs: recorded, replayed, and the same as in eager mode."""
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    args = on_gpu(problem(256, 320, 8, tokens=64, dtype=BF16))
    fixed = {name: value for name, value in args.items() if name not in ("x", "lora_A", "lora_B")}

    def layer(x, lora_A, lora_B):
        return masked_lora_linear(x=x, lora_A=lora_A, lora_B=lora_B, **fixed)

    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for step in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        now = args | {"x": torch.randn(64, 320, device="cuda").bfloat16() * (1 + step)}
        grad_y = torch.randn(64, 256, device="cuda").bfloat16()
        expected = run(masked_lora_linear, now, grad_y)
        inputs = leaves(now, ("x", "lora_A", "lora_B"))
        y = compiled(**inputs)
        y.backward(grad_y)
        assert torch.equal(y, expected["y"]), step
        for name, leaf in inputs.items():
            assert torch.equal(leaf.grad, expected[name]), (step, name)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_captured_layer_writes_to_no_memory_of_others(way, p, monkeypatch):
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    small, large = (on_gpu(problem(n, n, 8, tokens=64, dtype=BF16)) for n in (256, 2048))

    def layer(args):
        torch.default_generator.manual_seed(5)  # the CPU's: CUDA's cannot be seeded during a capture
        return masked_lora_linear(**args, dropout_p=p)

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = layer(small)
    with torch.cuda.graph(graph, stream=side):
        y = layer(small)
    with torch.cuda.stream(side):
        layer(large)
        # These take whatever memory the calls have left behind, and would show what a replay writes there.
        others = [torch.zeros(1 << n, dtype=torch.uint8, device="cuda") for n in range(9, 24) for _ in range(4)]
        y.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert not any(other.any() for other in others)


def test_two_threads_on_one_stream(way, monkeypatch):
    """Their launches interleave, and neither overwrites the effective weight of the other's layer."""
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    layers = [on_gpu(problem(512, 512, 8, tokens=64, dtype=BF16, seed=seed)) for seed in range(2)]
    expected = [masked_lora_linear(**args) for args in layers]

    def work(args):
        return [masked_lora_linear(**args) for _ in range(200)]

    with ThreadPoolExecutor(2) as pool:
        for results, right in zip(pool.map(work, layers), expected, strict=True):
            assert all(torch.equal(result, right) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_current(way):
    args = problem(192, 320, 8, tokens=100, dtype=BF16)
    grad_y = torch.randn(100, 192).bfloat16()
    here = run(masked_lora_linear, on_gpu(args), grad_y.cuda())
    there = run(masked_lora_linear, tensors(args, lambda tensor: tensor.to("cuda:1")), grad_y.to("cuda:1"))
    for name, value in here.items():
        assert close(there[name].cpu(), value.cpu()), name


@pytest.mark.sanitizer
def test_tiny_step_for_the_sanitizer(way):
    args = on_gpu(problem(33, 41, 3, tokens=5, dtype=BF16))
    inputs = leaves(args)
    masked_lora_linear(**(args | inputs), dropout_p=0.1).sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in inputs.values())
