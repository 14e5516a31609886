"""What the Triton masked-LoRA linear decides before it launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from losa_kernels.masked_lora import triton_launch, tuning


def test_factor_split():
    sizes = sorted({2**i for i in range(4, 10)} | {3 * 2**i for i in range(4, 9)})
    for depth in range(1, 3 * 128 + 1):
        head, tail = tuning.factor_split(depth)
        assert head + tail == min(size for size in sizes if size >= depth)
        assert head >= 16 and head & (head - 1) == 0 and tail in (0, head // 2)


def test_the_way_is_chosen_by_tokens_rank_and_shape(monkeypatch):
    monkeypatch.delenv("LOSA_MASKED_LORA", raising=False)
    for arch in (80, 90):
        for depth in (16, 32, 48, 96):
            choices = [tuning.fused(1 << i, 4096, 4096, depth, False, arch) for i in range(15)]
            assert choices[0] and not choices[-1]
            assert choices == sorted(choices, reverse=True), "fused up to a number of tokens"
            backward = [tuning.fused(1 << i, 4096, 4096, depth, False, arch, True) for i in range(15)]
            assert sum(backward) <= sum(choices), "the gradient of x is slower in registers"
        assert not tuning.fused(16, 4096, 4096, 32, True, arch), "fp32 composes"
        assert tuning.fused(64, 4096, 4096, 32, False, arch) and not tuning.fused(64, 4096, 4096, 384, False, arch)
        assert not tuning.fused(64, 128, 1 << 14, 32, False, arch), "few tiles leave the machine empty"
        assert not tuning.fused_projection(64, 4096, 4096, 2, False, arch), "G in bf16 costs less than it saves"
        assert tuning.fused_projection(32, 4096, 4096, 4, False, arch)
        assert not tuning.fused_projection(1 << 12, 4096, 4096, 4, False, arch)
        assert not tuning.fused_projection(32, 4096, 4096, 4, True, arch)
    for name in ("fused", "compose"):
        monkeypatch.setenv("LOSA_MASKED_LORA", name.upper())
        assert tuning.fused(1 << 14, 64, 64, 384, True, 80) == (name == "fused")
        assert tuning.fused_projection(1, 64, 64, 2, True, 80) == (name == "fused")
    monkeypatch.setenv("LOSA_MASKED_LORA", "both")
    with pytest.raises(ValueError, match="LOSA_MASKED_LORA: expected auto, fused, compose; got 'both'"):
        tuning.fused(1, 1, 1, 16, False, 90)


def test_fp32_precision_is_checked(monkeypatch):
    monkeypatch.setenv("LOSA_TRITON_FP32", "tf32")
    with pytest.raises(ValueError, match="LOSA_TRITON_FP32: expected ieee or tf32x3; got 'tf32'"):
        triton_launch._precision()


def test_tuning_takes_the_fastest_once(monkeypatch):
    monkeypatch.setattr(tuning, "_best", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tiles, device = tuning.LINEAR[90], torch.device("cuda")
    times, timed = dict(zip(tiles, (2.0, 1.0, float("inf")), strict=True)), []
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, tile: timed.append(tile) or times[tile])
    assert tuning.tuned(("key",), tiles, torch.device("cpu"), None) == tiles[0] and not timed
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert tuning.tuned(("key",), tiles, device, None) == tiles[0] and not timed
    for _ in range(2):
        assert tuning.tuned(("key",), tiles, device, None) == tiles[1]
    assert timed == list(tiles)
    monkeypatch.setenv("LOSA_AUTOTUNE", "0")
    assert tuning.tuned(("key",), tiles, device, None) == tiles[0]
