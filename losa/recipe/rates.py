"""The names that ``allocation.rates`` may give: what each importance is computed from, and how rates follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from losa.errors import shown
from losa.registry import Registry

# What a function of importance is given; ``losa.algorithm.measures`` takes it.
Needs = Literal["similarity", "normalised similarity", "scores", "cosines", "position", "linears", "losses"]
# How rates follow from importance: Eq. 5's linear programme, or rates that are affine in the importance. Or they do not
# follow from it, but are those of the least expected loss.
Fill = Literal["lp", "smooth", "curves"]
# Widths that are tried where the loss on calibration text chooses: shares of min(theta, 1 - theta), the widest box
# whose rates stay within 0 and 1.
TRIED_WIDTHS = (0.0, 1 / 6, 1 / 3, 1 / 2, 2 / 3)


@dataclass(frozen=True)
class Rates:
    """One name. ``delta``: the half width that it has by default, by ``default_delta``'s rule, or by the loss on
    calibration text (one of ``TRIED_WIDTHS``)."""

    needs: Needs
    fill: Fill = "lp"
    delta: float | Literal["rule", "loss"] = "rule"


# Recipes are checked without torch, so the functions are elsewhere: in losa.algorithm.importance, whose
# ``register_importance`` adds names to this table.
RATES: Registry[Rates] = Registry("importance")
RATES.register("cka", Rates("similarity"))
RATES.register("uniform", Rates("linears"))
RATES.register("cka_normalised", Rates("normalised similarity"))
# The papers' widths at 70 %: OWL's lambda, DLP's alpha.
RATES.register("owl", Rates("scores", "smooth", 0.08))
RATES.register("dlp", Rates("scores", "smooth", 0.15))
RATES.register("update", Rates("cosines", "smooth", 0.15))
RATES.register("atp", Rates("position", "smooth", "loss"))
RATES.register("fisher", Rates("losses", "curves", 0.5))


def compares_samples(rates: str) -> bool:
    """Whether calibration samples are compared with each other, so that it takes two that differ."""
    return RATES[rates].needs in ("similarity", "normalised similarity")


def takes_backward(rates: str) -> bool:
    """Whether the samples that serve rates go backward through the model, which must be whole then."""
    return RATES[rates].needs == "losses"


def follows_curves(rates: str, fill: Fill | None) -> bool:
    """Whether rates are those of the least expected loss. ``fill``: the recipe's, None for that of the rates."""
    return (fill or RATES[rates].fill) == "curves"


def tries_widths(rates: str, delta: float | None) -> bool:
    """Whether the width of the box is chosen by loss: a width that the recipe gives is taken as it is."""
    return delta is None and RATES[rates].delta == "loss"


def passes_for(rates: str, delta: float | None) -> int:
    """Forward passes over the samples that serve rates, in each round of a dynamic method, and not backward."""
    selections = selections_for(rates, delta)
    return (RATES[rates].needs not in ("linears", "position", "losses")) + (1 + selections if selections else 0)


def selections_for(rates: str, delta: float | None) -> int:
    """How often masks of the whole model are chosen for rates alone, in each round of a dynamic method; a loss is taken
    with each of them."""
    return len(TRIED_WIDTHS) if tries_widths(rates, delta) else 0


def check_counts(per: str, pattern: str | None) -> None:
    """Raises ValueError for rates that differ within a block, by ``allocation.per``, beside an N:M pattern."""
    if per != "block" and pattern is not None:
        raise ValueError(
            f"allocation.per: {per} needs prune.sparsity, got prune.pattern {pattern!r}, which gives all linears one "
            "keep count"
        )


def check_rates(value: object) -> object:
    """Raises ValueError for what is no registered name."""
    if value in RATES:
        return value
    *most, last = (repr(name) for name in RATES)
    raise ValueError(f"Input should be {', '.join(most)} or {last}, got {shown(value)}")
