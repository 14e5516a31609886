"""The names that ``allocation.rates`` may give, and what the importance of each name is computed from."""

from __future__ import annotations

from typing import Literal

from losa.errors import shown
from losa.registry import Registry

# "similarity": CKA between the outputs of blocks, from calibration samples. "linears": the wrapped linears themselves.
Needs = Literal["similarity", "linears"]

# Recipes are checked without torch, so the functions are elsewhere: in losa.algorithm.importance, whose
# ``register_importance`` adds names to this table.
RATES: Registry[Needs] = Registry("importance")
RATES.register("cka", "similarity")
RATES.register("uniform", "linears")


def compares_samples(rates: str) -> bool:
    """Whether calibration samples are compared with each other, so that it takes two that differ."""
    return RATES[rates] == "similarity"


def check_rates(value: object) -> object:
    """Raises ValueError for what is no registered name."""
    if value in RATES:
        return value
    *most, last = (repr(name) for name in RATES)
    raise ValueError(f"Input should be {', '.join(most)} or {last}, got {shown(value)}")
