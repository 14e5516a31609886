"""The rounds of a method, which the run and its estimate share."""

from __future__ import annotations

from losa.recipe.reading import parse_recipe
from losa.run.rounds import rounds_of


def recipe():
    return parse_recipe(
        {
            "model": "m",
            "output": "out",
            "compare": ["lora", "prune_only", "finetune_then_prune"],
            "prune": {"sparsity": 0.6},
            "rounds": {"count": 3},
            "allocation": {"mean_rank": 2, "rank_max": 3},
            "lora": {"rank": 5},
            "calibration": {"data": "c.txt"},
            "train": {"data": "t.txt", "round_share": 0.25},
        }
    )


def test_a_dynamic_method_has_the_recipes_rounds():
    rounds = rounds_of("losa", recipe(), 20)
    assert [r.index for r in rounds] == [1, 2, 3] and rounds[-1].sparsity == 0.6
    assert [r.mean_rank for r in rounds] == [2, 3, 3]
    assert [r.sequences for r in rounds] == [5, 5, 10]


def test_any_other_method_has_one_round_of_its_own_rank():
    for name, sequences in (("lora", 20), ("finetune_then_prune", 20), ("prune_only", 0)):
        (only,) = rounds_of(name, recipe(), 20)
        assert (only.sparsity, only.mean_rank, only.sequences) == (0.6, 5, sequences)
    assert rounds_of("adalora", recipe(), 20)[0].mean_rank == 8, "its budget begins with half as much again"


def test_methods_of_a_recipe_are_in_the_order_in_which_they_run():
    same = recipe().model_copy(update={"compare": ["losa", "prune_only", "losa", "prune_only"]})
    assert list(same.methods) == ["prune_only", "losa"]
