"""What each block keeps in a round: a share of its weights, or N of every M."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from losa.algorithm.keep_counts import allocate_keep_n
from losa.algorithm.rates import FILLS, uniform_rates
from losa.algorithm.schedule import Round
from losa.errors import RecipeError
from losa.pruners.base import Pattern
from losa.recipe.rates import Fill
from losa.recipe.sections import PruneConfig


def patterns_for(
    this_round: Round,
    importance: Tensor | None,
    reached: list[float],
    prune: PruneConfig,
    delta: float | None,
    fill: Fill = "lp",
) -> list[Pattern]:
    """Patterns of all blocks, whose mean sparsity is the round's.

    Args:
        this_round: its target sparsity.
        importance: (L,), or None where all blocks are pruned alike.
        reached: each block's sparsity before the round; masks that are nested never go below it.
        delta: half width of the box, None for the rule.
        fill: how rates follow from importance. Keep counts of N:M follow its order whatever the fill.

    Raises:
        ValueError: what is reached leaves no solution.
    """
    sparsity = torch.tensor(reached, dtype=torch.float64)
    if prune.pattern is not None:
        return _nm_patterns(this_round, importance, sparsity, prune, delta)
    if importance is None:
        rates = uniform_rates(len(reached), this_round.sparsity)
    else:
        assert fill != "curves", "such rates follow from more than importance"
        rates = FILLS[fill](importance, this_round.sparsity, delta, sparsity if prune.rates_nested else None)
    return [Pattern(sparsity=rate) for rate in rates.tolist()]


def _nm_patterns(
    this_round: Round, importance: Tensor | None, reached: Tensor, prune: PruneConfig, delta: float | None
) -> list[Pattern]:
    assert prune.keep_n_m is not None
    keep_n, m = prune.keep_n_m
    if abs(this_round.sparsity - prune.final_sparsity) < 1e-9 and not prune.mixed:
        return [Pattern(keep_n=keep_n, m=m)] * len(reached)
    ceiling = ((1 - reached) * m).round().long() if prune.rates_nested else None
    if importance is None:
        importance, delta = torch.zeros(len(reached), dtype=torch.float64), 0.0
    lowest = 1 if prune.mixed else keep_n
    counts = allocate_keep_n(importance, m * (1 - this_round.sparsity), m, delta, lo=lowest, ceiling=ceiling)
    return [Pattern(keep_n=n, m=m) for n in counts.tolist()]


def check_groups(prune: PruneConfig, in_features: Mapping[str, int]) -> None:
    """Raises RecipeError for a linear whose inputs an N:M pattern does not divide. ``in_features``: of each linear, by
    the name that the message gives it."""
    if prune.keep_n_m is None:
        return
    m = prune.keep_n_m[1]
    for name, count in in_features.items():
        if count % m:
            raise RecipeError(f"prune.pattern: {name} has in_features that are no multiple of {m}")
