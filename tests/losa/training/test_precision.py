"""The number type that training computes in."""

from __future__ import annotations

import torch

from losa.training.precision import autocast_dtype


def test_precision():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None and autocast_dtype("float32", cpu) is None
    assert autocast_dtype("float32", torch.device("cuda")) is None


def test_bfloat16_on_a_cpu_needs_its_instructions(monkeypatch, caplog):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert autocast_dtype("bfloat16", torch.device("cpu")) is None
    assert "no bfloat16 instructions" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert autocast_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
