"""Recipes: what is refused, and how the message reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from losa.errors import RecipeError
from losa.recipe import load_recipe, parse_recipe

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


def settings(**changes) -> dict:
    base = {
        "model": "somewhere",
        "output": "out",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt"},
        "train": {"data": ["a.jsonl", {"path": "b", "limit": 3}]},
    }
    return base | changes


def test_defaults_are_the_papers():
    recipe = parse_recipe(settings())
    assert (recipe.rounds.count, recipe.rounds.schedule) == (5, "cubic")
    assert (recipe.allocation.mean_rank, recipe.allocation.rank_max) == (6, 16)
    assert (recipe.lora.scaling, recipe.lora.rank, recipe.lora.dropout) == (2.0, 8, 0.0)
    assert (recipe.train.learning_rate, recipe.train.warmup, recipe.train.max_grad_norm) == (2e-4, 0.3, 0.3)
    assert [s.path for s in recipe.train.data] == ["a.jsonl", "b"] and recipe.train.data[1].limit == 3
    assert recipe.calibration.data[0].path == "c.txt"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_valid(path):
    assert load_recipe(path).method == "losa"


def test_there_are_examples():
    assert {"smollm2-cpu", "llama2-7b-wanda70", "opt-13b-wanda50"} <= {p.stem for p in EXAMPLES}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": 0.5}, "sparsity: unknown key"),
        ({"prune": {"sparsity": 0.5, "prunner": "wanda"}}, "prune.prunner: unknown key"),
        ({"prune": {"sparsity": 0}}, "prune.sparsity: .*greater than 0, got 0"),
        ({"prune": {"sparsity": 0.96}}, "prune.sparsity: .*0.95, got 0.96"),
        ({"prune": {"sparsity": 1}}, "prune.sparsity"),
        ({"prune": {}}, "exactly one of prune.sparsity and prune.pattern"),
        ({"prune": {"sparsity": 0.5, "pattern": "2:4"}}, "exactly one of"),
        ({"prune": {"pattern": "4:4"}}, "0 < keep_n < m"),
        ({"prune": {"pattern": "2-4"}}, "prune.pattern"),
        ({"prune": {"pattern": "1:32"}}, "exceeds sparsity"),
        ({"prune": {"sparsity": 0.5, "mixed": True}}, "prune.mixed needs"),
        ({"allocation": {"mean_rank": 20}}, "rank_min <= mean_rank <= rank_max"),
        ({"allocation": {"rank_max": 200}}, "allocation.rank_max"),
        ({"method": "magic"}, "method"),
        ({"train": None}, "train: method 'losa' needs"),
        ({"method": "prune_only", "compare": ["lora"], "train": None}, "method 'lora' needs"),
        ({"calibration": {"data": []}}, "calibration.data"),
        ({"rounds": {"count": 0}}, "rounds.count"),
    ],
)
def test_refusals_name_the_key(change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(settings(**change))


def test_several_problems_are_all_named():
    with pytest.raises(RecipeError, match="2 problem") as caught:
        parse_recipe(settings(prune={"sparsity": 2}, typo=1))
    assert "prune.sparsity" in str(caught.value) and "typo" in str(caught.value)


def test_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(settings()))
    recipe = load_recipe(path, {"prune.sparsity": 0.25, "rounds.count": 2, "seed": 7})
    assert (recipe.prune.sparsity, recipe.rounds.count, recipe.seed) == (0.25, 2, 7)
    with pytest.raises(RecipeError, match="'model' is not a section"):
        load_recipe(path, {"model.name": 1})


@pytest.mark.parametrize(
    "text, message", [(None, "cannot be read"), ("a: [", "not valid YAML"), ("- 1", "expected a mapping")]
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
