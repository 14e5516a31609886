"""Fixtures of the package's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def own_names(monkeypatch):
    """Names that a test registers are gone after it."""
    from losa import pruners
    from losa.algorithm import importance, statistics
    from losa.packed.formats import NOTES
    from losa.packed.weights import FORMATS
    from losa.recipe.rates import RATES

    for registry in (pruners._REGISTRY, importance._REGISTRY, statistics._REGISTRY, RATES, FORMATS, NOTES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
