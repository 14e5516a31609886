"""How much each block matters: what ``allocation.rates`` of a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losa.recipe.rates import RATES, Needs
from losa.registry import Registry

# From what the importance needs to (L,), or to None where all blocks get the same rate.
Function = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Importance:
    """``function`` of what it ``needs`` gives the importance of every block: (L,) floating point, finite; or None,
    where all blocks get the same rate.

    ``needs`` is "similarity", for (L, L) fp64 CKA between the outputs of blocks (Eq. 6), or "linears", for a list of
    L dictionaries of ``MaskedLoRALinear`` by name within the block.
    """

    needs: Needs
    function: Function


_REGISTRY: Registry[Importance] = Registry("importance")


def register_importance(name: str, *, needs: Needs) -> Callable[[Function], Function]:
    """Let recipes name a function as ``allocation.rates: name``: a decorator of the function. See ``Importance``.

    Raises:
        ValueError: the name belongs to another function.
    """

    def add(function: Function) -> Function:
        RATES.register(name, needs)
        _REGISTRY.register(name, Importance(needs, function))
        return function

    return add


def get_importance(name: str) -> Importance:
    """What a recipe names. Raises KeyError; recipes are checked for it when they are read."""
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


@register_importance("uniform", needs="linears")
def uniform_importance(linears: object) -> None:
    """The ablation without layer-wise rates."""


register_importance("cka", needs="similarity")(cka_importance)
