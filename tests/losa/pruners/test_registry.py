"""Pruners by name: the package's own, and pruners that code outside it registers."""

from __future__ import annotations

import pytest

from losa.errors import RecipeError
from losa.pruners import Pruner, get_pruner, register
from losa.recipe.sections import PruneConfig


class Nothing(Pruner):
    def prune(self, weight, statistic, pattern, mask):
        raise AssertionError


def test_registered_by_call_or_decorator(own_names):
    assert register("called", Nothing) is Nothing is register("decorated")(Nothing), "the class is given back"
    for name in ("called", "decorated"):
        assert type(get_pruner(PruneConfig(pruner=name, sparsity=0.5))) is Nothing
    register("called", Nothing)  # once more is no other class


def test_refusals(own_names):
    register("mine", Nothing)
    with pytest.raises(ValueError, match="pruner 'mine': already registered as Nothing"):
        register("mine", type("Other", (Nothing,), {}))
    with pytest.raises(ValueError, match="pruner 'empty': Empty lacks prune or prune_block"):
        register("empty", type("Empty", (Pruner,), {}))
    for other in (object, Nothing(None), "wanda"):
        with pytest.raises(ValueError, match="pruner 'other': expected a subclass of losa.pruners.Pruner, got "):
            register("other", other)


def test_unknown_pruner_lists_the_known():
    known = "alps, magnitude, pruner_zero, sparsegpt, wanda, wanda_sp"
    with pytest.raises(RecipeError, match=f"'wandaa'; expected one of {known}$"):
        get_pruner(PruneConfig(pruner="wandaa", sparsity=0.5))
