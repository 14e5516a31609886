"""What every test gets: no network, uninitialised memory full of junk, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import sys
from pathlib import Path

import pytest
import torch
from emulation import drivers, emulate  # noqa: F401  fixtures

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    # CI repeats the same examples; elsewhere every run tries new ones.
    settings.register_profile("ci", derandomize=True, deadline=None)
    if os.environ.get("CI"):
        settings.load_profile("ci")

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / package) + os.sep for package in ("losa", "losa_kernels"))
ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))

# GPU machines without network may lack these; there, tests that need them are skipped instead of failing to import.
NOT_ON_EVERY_GPU_MACHINE = ("pydantic", "datasets", "gguf", "hypothesis", "typer", "peft", "compressed_tensors")


# torch lists its factory functions when a device context is first used; it must list the real ones, not our wrappers.
with torch.device("cpu"):
    torch.empty(0)


def junk(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no result may contain: NaN, or a bit pattern that is wrong as mask, index and count."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(0xA5 if tensor.dtype == torch.uint8 else torch.iinfo(tensor.dtype).min + 0x5A)


def poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not sys._getframe(1).f_code.co_filename.startswith(OURS):
            return tensor
        with torch.no_grad():
            return junk(tensor)

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty and its kin return junk to losa and losa_kernels, so that an output left unwritten shows."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def poisoned_native_memory():
    """The same for allocations of native code, through torch's own switch for filling uninitialised memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["fused", "compose"])
def way(request, monkeypatch) -> str:
    """Both ways of the Triton masked-LoRA linear."""
    monkeypatch.setenv("LOSA_MASKED_LORA", request.param)
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords or "sanitizer" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    outcome = yield
    report = outcome.get_result()
    if report.outcome != "failed" or not torch.cuda.is_available():
        return
    for name in NOT_ON_EVERY_GPU_MACHINE:
        if f"No module named '{name}'" in str(report.longrepr):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {name} is not installed")
