"""The Triton Gram kernel: test_cka.py again in the interpreter, in a process of its own, for its machine code see
test_triton_aot.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from losa_kernels.cka import triton as cka
from tests.helpers.interpreter import run_in_interpreter, starts_interpreter


@starts_interpreter
def test_in_the_interpreter(tmp_path):
    """All of test_cka.py but what is about the reference's chunks; splits as on a GPU with three processors."""
    (tmp_path / "three_processors.py").write_text(
        "from losa_kernels.cka import triton as cka\ncka._processors = lambda device: 3\n"
    )
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    tests = str(Path(__file__).with_name("test_cka.py"))
    run_in_interpreter(tests, "-k", "not chunks", "-p", "three_processors", PYTHONPATH=path)


@pytest.mark.parametrize("samples", [200, 65, 64, 5])
def test_several_launches_are_one(samples, monkeypatch):
    monkeypatch.setattr(cka, "LAUNCH_COLUMNS", 3)
    calls = []
    features = torch.randn(2, samples, 10)
    monkeypatch.setattr(cka, "_gram", lambda part: calls.append(part.shape[2]) or part.double() @ part.double().mT)
    found = cka.gram(features)
    assert calls == [3, 3, 3, 1]
    assert (found - features @ features.mT).abs().max() <= 16 * torch.finfo(torch.float32).eps * found.abs().max()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_products_are_deep_enough_for_every_triton(capability):
    """Triton 3.6 multiplies tiles whose inner side is 16 or more."""
    for samples in (1, 2, 16, 33, 64, 65, 128, 129, 256):
        for columns in (1, 47, 1 << 16):
            constants = cka.tile(samples, columns, capability)
            assert constants["BLOCK_P"] >= 16 and constants["ROWS"] * constants["BLOCKS"] >= samples
            widest = 32 if 90 <= capability < 120 else 16
            assert constants["ROWS"] < 128 or constants["BLOCK_P"] <= widest, "registers of the operands"
