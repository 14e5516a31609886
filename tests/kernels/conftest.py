"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from losa_kernels import native
from tests.helpers.sweep_problems import sweep


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Caps the instruction set, so that the code for lesser ones is tested too."""
    monkeypatch.setenv("LOSA_CPU_ISA", request.param)
    info = native.build_info()
    if info is None or info["cpu_isa_selected"] != request.param:
        pytest.skip(f"this build or CPU does not run {request.param}")


@pytest.fixture
def plain(monkeypatch):
    """What the loop gives without a graph."""

    def call(*args, **kwargs):
        with monkeypatch.context() as context:
            context.setenv("LOSA_SWEEP_GRAPH", "0")
            return sweep(*args, **kwargs)

    return call
