"""What every test gets: no network, uninitialised memory full of junk, GPU tests skipped where there is no GPU, and an
error of the GPU in the report of the test that caused it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# cuBLAS reads it once; torch's deterministic mode asks for it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import functools
import sys
from pathlib import Path

import pytest
import torch

from losa_kernels.settings import FAILED_TESTS, TEST_RUN
from tests.helpers.emulation import drivers, emulate  # noqa: F401  fixtures

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


@pytest.fixture(autouse=True, scope="session")
def shared_folder(tmp_path_factory):
    """For ``shared.made``: the same in all of pytest-xdist's workers, whose own folders are inside it."""
    folder = tmp_path_factory.getbasetemp()
    os.environ[TEST_RUN.name] = str(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if needs_gpu(item):
            item.add_marker(skip)


def needs_gpu(item) -> bool:
    """By its marks: an item's keywords are also the names of the folders above it."""
    return any(item.get_closest_marker(mark) is not None for mark in ("gpu", "sanitizer"))


@pytest.fixture(autouse=True)
def synchronised(request):
    """What a GPU test launched ends before the test does: errors come late, and would be another test's."""
    yield
    if needs_gpu(request.node) and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """After an error that the CUDA context does not survive, every later test of this process would fail: it ends, and
    pytest-xdist goes on in a new one. trylast: the report has been sent by then.

    LOSA_FAILED_TESTS names a file that gets the names of failed tests while the others still run.
    """
    worker = "PYTEST_XDIST_WORKER" in os.environ
    if report.failed and not worker and (file := FAILED_TESTS()):
        with open(file, "a") as names:
            names.write(f"{report.nodeid}\n")
    if report.when != "teardown" or not report.failed or not device_is_lost():
        return
    if worker:
        os._exit(1)
    pytest.exit(f"{report.nodeid}: the CUDA context is lost", returncode=1)


def device_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
