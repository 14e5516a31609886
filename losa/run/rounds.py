"""The rounds of a method, for the run and for its estimate."""

from __future__ import annotations

import math
from dataclasses import replace

from losa.algorithm.schedule import Round, make_schedule
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.sections import Recipe


def rounds_of(name: MethodName, recipe: Recipe, sequences: int) -> list[Round]:
    """A dynamic method has the recipe's rounds; any other method has one round, with adapters of its first rank.

    Args:
        sequences: training sequences that there are; a method that trains nothing takes none.
    """
    method = METHODS[name]
    rounds = recipe.rounds if method.dynamic else recipe.rounds.model_copy(update={"schedule": "oneshot"})
    share = recipe.train.round_share if recipe.train is not None else 1.0
    sequences = sequences if method.trains else 0
    schedule = make_schedule(rounds, recipe.allocation, recipe.prune.final_sparsity, sequences, share)
    return schedule if method.dynamic else [replace(one, mean_rank=first_rank(name, recipe)) for one in schedule]


def first_rank(name: MethodName, recipe: Recipe) -> int:
    """The rank that a method's adapters begin with."""
    method = METHODS[name]
    return recipe.allocation.mean_rank if method.dynamic else math.ceil(method.first_rank * recipe.lora.rank)
