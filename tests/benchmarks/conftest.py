"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest

from benchmarks import _timing


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """The tests ask for rows, not for the speed of the machine."""
    monkeypatch.setitem(_timing.PRODUCT_SIDE, "cpu", 128)
