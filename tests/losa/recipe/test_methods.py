"""The table of methods."""

from __future__ import annotations

from typing import get_args

import pytest

from losa.errors import RecipeError
from losa.recipe import methods
from losa.recipe.methods import METHODS, MethodName, check_packages, find_method, method_label


def test_every_name_that_a_recipe_takes_is_a_row():
    assert list(METHODS) == list(get_args(MethodName))


@pytest.mark.parametrize("name", METHODS)
def test_rows_say_no_two_things(name):
    method = METHODS[name]
    assert (method.adapter is None) == (method.training is None) == (not method.trains)
    assert method.ranked or not method.dynamic, "dynamic ranks are ranks of something that is trained"
    # Merging changes nothing but a dense adapter that was trained beside a mask.
    assert method.mergeable == (method.training != "rounds" or method.adapter in ("masked", "weights"))


def test_labels_tell_methods_apart():
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    assert method_label("losa") == "LoSA" and method_label("dense") == "dense"
    assert find_method("dense") is None and find_method("lora") is METHODS["lora"]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    check_packages(["losa", "sora", "sparse_full"])
    with pytest.raises(RecipeError, match="method: 'adalora' needs the package peft: pip install peft"):
        check_packages(["losa", "adalora"])
