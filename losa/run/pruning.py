"""A recipe's pruner, checked before any work against the recipe's other sections and against the model."""

from __future__ import annotations

from torch import nn

from losa.algorithm.linear_rates import check_linear
from losa.algorithm.regrowth import check_regrowth
from losa.algorithm.structure import check_rates, find_structure
from losa.pruners import get_pruner
from losa.recipe.sections import Recipe


def check_pruner(recipe: Recipe) -> None:
    """Raises RecipeError for an unknown pruner, for settings that it cannot follow, for regrowth that it does not know,
    and for rates between blocks or linears that it cannot follow."""
    pruner = get_pruner(recipe.prune)
    check_regrowth(recipe.prune, pruner)
    if not recipe.any_rated:
        return
    if pruner.structured:
        check_rates(recipe.prune, recipe.allocation)
    if recipe.allocation.per != "block":
        check_linear(recipe.prune, recipe.allocation, pruner)


def check_prunable(recipe: Recipe, model: nn.Module) -> None:
    """Raises ModelError as ``find_structure`` if the pruner is structured. The model may be on meta."""
    if get_pruner(recipe.prune).structured:
        find_structure(model)
