"""Fixtures of the package's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def own_names(monkeypatch):
    """Names that a test registers are gone after it."""
    from losa.packed.formats import NOTES
    from losa.packed.weights import FORMATS

    for registry in (FORMATS, NOTES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
