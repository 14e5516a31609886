"""Pruning methods by name; ``register`` adds one of your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

from losa.errors import RecipeError
from losa.pruners.alps import Alps
from losa.pruners.base import Pattern, Pruned, Pruner
from losa.pruners.cost import LinearShape, Memory, PruningShape
from losa.pruners.magnitude import Magnitude
from losa.pruners.pruner_zero import PrunerZero
from losa.pruners.sparsegpt import SparseGPT
from losa.pruners.structure import Counts, Structure
from losa.pruners.wanda import Wanda
from losa.pruners.wanda_sp import WandaSP
from losa.recipe.sections import PruneConfig
from losa.registry import Registry

__all__ = [
    "Counts",
    "LinearShape",
    "Memory",
    "Pattern",
    "Pruned",
    "Pruner",
    "PruningShape",
    "Structure",
    "get_pruner",
    "register",
]

_P = TypeVar("_P", bound=Pruner)
_REGISTRY: Registry[type[Pruner]] = Registry("pruner")


@overload
def register(name: str) -> Callable[[type[_P]], type[_P]]: ...
@overload
def register(name: str, pruner: type[_P]) -> type[_P]: ...
def register(name: str, pruner: type[_P] | None = None) -> Callable[[type[_P]], type[_P]] | type[_P]:
    """Let recipes name a class as ``prune.pruner: name``: ``@register(name)`` above it, or ``register(name, cls)``.

    Raises:
        ValueError: no ``Pruner``, one that overrides neither ``prune`` nor ``prune_block``, or the name belongs to
            another class.
    """
    if pruner is None:
        return lambda given: register(name, given)
    if not (isinstance(pruner, type) and issubclass(pruner, Pruner)):
        raise ValueError(f"pruner {name!r}: expected a subclass of losa.pruners.Pruner, got {pruner!r}")
    if pruner.prune is Pruner.prune and pruner.prune_block is Pruner.prune_block:
        raise ValueError(f"pruner {name!r}: {pruner.__name__} lacks prune or prune_block")
    _REGISTRY.register(name, pruner)
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
register("alps", Alps)
register("pruner_zero", PrunerZero)
register("wanda_sp", WandaSP)
