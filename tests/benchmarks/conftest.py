"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest

from benchmarks import _timing


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """The tests ask whether rows are written, not how fast the machine is: a small product measures its rate."""
    monkeypatch.setitem(_timing.PRODUCT_SIDE, "cpu", 128)
