"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from losa_kernels import native
from tests.helpers.sweep_graphs import sweep


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Caps the instruction set, so that the code for lesser ones is tested too."""
    if native.missing("cpu") is not None:
        pytest.skip(native.missing("cpu"))
    monkeypatch.setenv("LOSA_CPU_ISA", request.param)
    if native.cpu_isa() != request.param:
        pytest.skip(f"this build or CPU does not run {request.param}")
    return request.param


@pytest.fixture
def plain(monkeypatch):
    """What the loop gives without a graph."""

    def call(*args, **kwargs):
        with monkeypatch.context() as context:
            context.setenv("LOSA_SWEEP_GRAPH", "0")
            return sweep(*args, **kwargs)

    return call
