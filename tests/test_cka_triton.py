"""The Triton Gram kernel: test_cka.py again in the interpreter, in a process of its own, and its machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import aot
from test_masked_lora_triton import interpreter_problem

from losa_kernels.cka import triton as cka


@pytest.mark.subprocess
@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
def test_in_the_interpreter(tmp_path):
    """All of test_cka.py but what is about the reference's chunks; splits as on a GPU with three processors."""
    (tmp_path / "three_processors.py").write_text(
        "from losa_kernels.cka import triton as cka\ncka._processors = lambda device: 3\n"
    )
    environment = {"TRITON_INTERPRET": "1", "LOSA_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    tests = str(Path(__file__).with_name("test_cka.py"))
    command = [sys.executable, "-m", "pytest", tests, "-m", "not gpu", "-k", "not chunks", "-p", "three_processors"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout or "....." in done.stdout, done.stdout


@pytest.mark.parametrize("samples", [200, 65, 64, 5])
def test_several_launches_are_one(samples, monkeypatch):
    monkeypatch.setattr(cka, "LAUNCH_COLUMNS", 3)
    calls = []
    features = torch.randn(2, samples, 10)
    monkeypatch.setattr(cka, "_launch", lambda part: calls.append(part.shape[2]) or part.double() @ part.double().mT)
    found = cka.gram(features)
    assert calls == [3, 3, 3, 1]
    assert (found - features @ features.mT).abs().max() <= 16 * torch.finfo(torch.float32).eps * found.abs().max()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("samples", "columns"), [(16, 1 << 16), (64, 1 << 16), (128, 1 << 16), (256, 1 << 16), (2, 1), (16, 47), (60, 3)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_machine_code(arch, samples, columns, dtype):
    """Tensor cores but for the smallest problems, whose error an fp32 product must bound."""
    constants = cka.tile(samples, columns, arch)
    tile = SimpleNamespace(warps=constants.pop("num_warps"), stages=constants.pop("num_stages"))
    features = torch.empty(4, samples, columns, dtype=dtype, device="meta")
    launch = aot.Launch(
        cka._gram_kernel, None, tile,
        features=features, partial=torch.empty(1, device="meta"), samples=samples, columns=columns,
        columns_per_split=min(4096, -(-columns // 32) * 32), stride_layer=features.stride(0),
        stride_sample=features.stride(1), stride_column=1,
        **constants,
    )  # fmt: skip
    figures = launch.compile(arch)
    assert figures["spills"] == 0 and figures["shared"] <= aot.SHARED_LIMIT[arch], figures
    if samples + columns >= cka.SPLIT_FROM:
        assert figures["hgmma" if arch == 90 and samples >= 64 else "hmma"] > 0 and figures["loop_mma"] > 0, figures
    else:
        assert figures["hgmma"] == figures["hmma"] == 0, figures
