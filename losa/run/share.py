"""Whether a run would leave most of a model as it is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from losa.errors import ModelError
from losa.model.blocks import weight_count
from losa.model.wrapping import matrix_weights
from losa.recipe.sections import PruneConfig

LEAST = 0.5


def check_share(prune: PruneConfig, model: nn.Module, linears: Iterable[nn.Module]) -> None:
    """Raises ModelError where so few of the blocks' weights can be pruned that less than ``LEAST`` of the sparsity that
    was asked for would come out, unless the recipe says ``partly``, or which linears it means. ``linears``: those that
    can be pruned, wrapped or not."""
    if prune.partly or prune.targets is not None:
        return
    prunable, every = sum(map(weight_count, linears)), matrix_weights(model)
    if prunable >= LEAST * every:
        return
    asked, share = prune.final_sparsity, prunable / every
    raise ModelError(
        f"model: {prunable:,} of the {every:,} weights in its blocks' matrices can be pruned ({share:.1%}): instead of "
        f"{asked:.0%} zeros the blocks would have {asked * share:.1%}. prune.partly: true (--yes) goes on"
    )
