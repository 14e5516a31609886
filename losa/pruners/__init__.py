"""Pruning methods by name; ``register`` adds one of your own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from losa.errors import RecipeError
from losa.pruners.base import Pattern, Pruned, Pruner, Statistic
from losa.pruners.magnitude import Magnitude
from losa.pruners.sparsegpt import SparseGPT
from losa.pruners.wanda import Wanda
from losa.recipe.sections import PruneConfig

__all__ = ["Pattern", "Pruned", "Pruner", "Statistic", "get_pruner", "register"]

_REGISTRY: dict[str, type] = {}


def register(name: str, pruner: type | None = None) -> Callable[[type], type] | type:
    """Let recipes name a class as ``prune.pruner: name``: ``@register(name)`` above it, or ``register(name, cls)``.

    It is built as ``cls(config: PruneConfig)``. Raises ValueError when it does not fit the ``Pruner`` protocol or the
    name belongs to another class.
    """
    if pruner is None:
        return partial(register, name)
    missing = [a for a in ("statistic", "updates_weight", "prune") if not hasattr(pruner, a)]
    if missing:
        raise ValueError(f"pruner {name!r}: {pruner.__name__} lacks {', '.join(missing)}")
    if _REGISTRY.get(name, pruner) is not pruner:
        raise ValueError(f"pruner {name!r}: already registered as {_REGISTRY[name].__name__}")
    _REGISTRY[name] = pruner
    return pruner


def get_pruner(config: PruneConfig) -> Pruner:
    """The recipe's pruner. Raises RecipeError for an unknown name, listing the known ones."""
    if config.pruner not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise RecipeError(f"prune.pruner: unknown {config.pruner!r}; expected one of {known}")
    return _REGISTRY[config.pruner](config)


register("magnitude", Magnitude)
register("wanda", Wanda)
register("sparsegpt", SparseGPT)
