"""A recipe's pruner, checked before any work against the recipe's other sections and against the model."""

from __future__ import annotations

from torch import nn

from losa.algorithm.linear_rates import check_linear
from losa.algorithm.regrowth import check_regrowth
from losa.algorithm.structure import check_rates, find_structure
from losa.model.blocks import Blocks, expert_lists
from losa.model.forms import choices_of_form, holder_of
from losa.pruners import get_pruner
from losa.recipe.methods import METHODS
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


def experts_are_reached(recipe: Recipe, blocks: Blocks) -> bool:
    """Whether every linear of experts that the recipe trains will get gradients in every process, whether tokens come
    or not (``losa.modules.linear_experts.all_get_gradients``). The model is not wrapped yet."""
    adapters = {METHODS[name].adapter for name in recipe.methods if METHODS[name].trains}
    chosen = blocks.linears(recipe.prune.targets).values()
    inside = {module for block in blocks for experts in expert_lists(block) for module in experts.modules()}
    in_stacks = any(choices_of_form(holder_of(linear)) is not None for linear in chosen)
    joined = adapters <= {"masked"} and recipe.lora.dropout == 0
    return not adapters or not (inside.intersection(chosen) or (in_stacks and not joined))
