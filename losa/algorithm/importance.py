"""How much each block matters: what ``allocation.rates`` of a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from losa.recipe.rates import RATES, Needs
from losa.registry import Registry

# See ``register_importance``. What each function needs is in ``losa.recipe.rates.RATES``.
Importance = Callable[[Any], Tensor | None]

_REGISTRY: Registry[Importance] = Registry("importance")


def register_importance(name: str, *, needs: Needs) -> Callable[[Importance], Importance]:
    """Let recipes name a function as ``allocation.rates: name``: a decorator of the function.

    The function takes what it needs and returns the importance of every block, (L,) floating point, finite; or None,
    where all blocks get the same rate.

    Args:
        needs: "similarity", for (L, L) fp64 CKA between the outputs of blocks (Eq. 6); or "linears", for a list of L
            dictionaries of ``MaskedLoRALinear`` by name within the block. In a sharded model their parameters are
            DTensors; an importance that is a DTensor too is made whole.

    Raises:
        ValueError: ``needs`` is something else, or the name belongs to another function.
    """
    if needs not in get_args(Needs):
        raise ValueError(f"importance {name!r}: needs: expected {' or '.join(get_args(Needs))}, got {needs!r}")

    def add(importance: Importance) -> Importance:
        RATES.register(name, needs)
        _REGISTRY.register(name, importance)
        return importance

    return add


def get_importance(name: str) -> Importance:
    """The function that a recipe names. Raises KeyError; recipes are checked for it when they are read."""
    return _REGISTRY[name]


def cka_importance(similarity: Tensor, beta: float = 1.0) -> Tensor:
    """I_l = exp(-beta c_l / sum_k c_k) with c_l = sum_{j != l} CKA(l, j) (Eq. 4, normalised): a block that repeats what
    other blocks carry matters less.

    ``beta`` > 0 rescales importance but keeps its order, and the optimum of Eq. 5 depends on the order only, so rates
    do not depend on it.

    Args:
        similarity: (L, L), diagonal ignored.

    Returns:
        (L,) fp64.

    Raises:
        ValueError: not square, or not finite.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) == 0:
        raise ValueError(f"similarity: expected (L, L), got {tuple(similarity.shape)}")
    if not torch.isfinite(similarity).all():
        raise ValueError("similarity: expected finite values")
    redundancy = similarity.double().clone().fill_diagonal_(0).sum(1)
    total = redundancy.sum()
    return torch.exp(-beta * redundancy / total) if total != 0 else torch.ones_like(redundancy)


def uniform_importance(linears: object) -> None:
    """The ablation without layer-wise rates."""


_REGISTRY.register("cka", cka_importance)
_REGISTRY.register("uniform", uniform_importance)
