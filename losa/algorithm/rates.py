"""Each block's sparsity rate, from its importance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MAX_RATE = 0.99
# Targets come from arithmetic such as 1 - keep_n / m, which rounds.
ROUNDING = 1e-9
# Counted masks may overshoot their round by a weight here and there.
FLOOR_OVERSHOOT = 1e-3


def default_delta(target: float) -> float:
    """Half width of the box around ``target``: the paper's .01/.02/.03 up to .5/.6/.7, then 0.1 (1 - target), which
    continues at .7 and keeps every rate below 1.

    Raises ValueError outside [0, 0.95].
    """
    if not -ROUNDING <= target <= 0.95 + ROUNDING:
        raise ValueError(f"target: expected 0 <= target <= 0.95, got {target}")
    for limit, delta in ((0.5, 0.01), (0.6, 0.02), (0.7, 0.03)):
        if target <= limit + ROUNDING:
            return delta
    return 0.1 * (1 - target)


def uniform_rates(count: int, target: float) -> Tensor:
    """(count,) fp64, all ``target``: the ablation without layer-wise rates."""
    return torch.full((count,), target, dtype=torch.float64)


def rates_for(importance: Tensor, target: float, delta: float | None = None, floor: Tensor | None = None) -> Tensor:
    """Sparsity rate per block: min sum_l I_l s_l with mean s = target and |s_l - target| <= delta (Eq. 5).

    A linear programme with one equality, solved exactly by sorting: the least important blocks rise to their upper
    bounds until the budget ends. Ties: the first block gets sparser first.

    Args:
        importance: (L,), finite; only its order counts.
        target: theta_t, the mean rate, at most 0.99.
        delta: half width of the box; default ``default_delta(target)``. The box is cut to [0, 0.99].
        floor: (L,) rates already reached, below which nested masks cannot go. A floor above the box becomes the
            block's rate.

    Returns:
        (L,) fp64 with mean ``target`` to rounding. Floors whose mean exceeds it by up to 1e-3, as counted masks may
        after many small rounds, are returned as they are.

    Raises:
        ValueError: bad shapes or values, or floors that leave no solution.
    """
    delta = _checked_delta(importance, target, delta)
    lower, upper = _bounds(len(importance), max(target - delta, 0.0), min(target + delta, MAX_RATE), floor)
    budget = _budget(target, lower)
    rates = lower.clone()
    for index in importance.argsort(stable=True).tolist():
        step = min(max(budget, 0.0), (upper - lower)[index].item())
        rates[index] += step
        budget -= step
    return rates


def smooth_rates(importance: Tensor, target: float, delta: float | None = None, floor: Tensor | None = None) -> Tensor:
    """Sparsity rate per block, affine in its importance: s_l = target - 2 delta (z_l - mean z), with z the importances
    brought to [0, 1]. OWL (Yin et al. 2024) and DLP (Chen et al. 2025) spread their densities so.

    The most and the least important block are 2 delta apart, and the mean is the target. A rate is further than delta
    from the target where importances lie to one side. Where rates leave [0, 0.99] or fall below their floors, all
    rates move by one amount before they are cut, which keeps the mean.

    Args:
        importance: (L,), finite; equal importances give equal rates.
        target: theta_t, the mean rate, at most 0.99.
        delta: half of the rates' span; default ``default_delta(target)``.
        floor: (L,) rates already reached, below which nested masks cannot go.

    Returns:
        (L,) fp64 with mean ``target`` to rounding. Floors that overshoot it: as in ``rates_for``.

    Raises:
        ValueError: bad shapes or values, or floors that leave no solution.
    """
    delta = _checked_delta(importance, target, delta)
    lower, upper = _bounds(len(importance), 0.0, MAX_RATE, floor)
    if _budget(target, lower) <= 0:
        return lower
    place = importance.double() - importance.double().min()
    place = place / place.max() if place.max() > 0 else place
    wished = target - 2 * delta * (place - place.mean())
    if bool(((wished >= lower) & (wished <= upper)).all()):
        return wished
    # The sum of the cut rates is piecewise linear in the amount, with kinks where a rate meets a bound.
    amounts = torch.cat([lower - wished, upper - wished]).sort().values
    sums = torch.maximum(torch.minimum(wished + amounts[:, None], upper), lower).sum(1)
    amount = float(np.interp(target * len(importance), sums.numpy(), amounts.numpy()))
    return torch.maximum(torch.minimum(wished + amount, upper), lower)


FILLS: dict[Literal["lp", "smooth"], Callable[[Tensor, float, float | None, Tensor | None], Tensor]] = {
    "lp": rates_for,
    "smooth": smooth_rates,
}


def _checked_delta(importance: Tensor, target: float, delta: float | None) -> float:
    """``delta``, or its default. Raises ValueError for what a fill cannot work on."""
    if importance.dim() != 1 or len(importance) == 0:
        raise ValueError(f"importance: expected (L,), got {tuple(importance.shape)}")
    if not torch.isfinite(importance).all():
        raise ValueError(f"importance: expected finite values, got {importance.tolist()}")
    if not 0 <= target <= MAX_RATE:
        raise ValueError(f"target: expected 0 <= target <= {MAX_RATE}, got {target}")
    delta = default_delta(target) if delta is None else delta
    if delta < 0:
        raise ValueError(f"delta: expected >= 0, got {delta}")
    return delta


def _bounds(count: int, lower: float, upper: float, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest rate of each block, (L,) fp64."""
    low, high = uniform_rates(count, lower), uniform_rates(count, upper)
    if floor is not None:
        if tuple(floor.shape) != (count,):
            raise ValueError(f"floor: expected ({count},), got {tuple(floor.shape)}")
        if not bool(((floor >= 0) & (floor <= 1)).all()):
            raise ValueError(f"floor: expected rates in [0, 1], got {floor.tolist()}")
        low = torch.maximum(low, floor.to(low))
        high = torch.maximum(high, low)
    return low, high


def _budget(target: float, lower: Tensor) -> float:
    """What the rates have left to rise from ``lower``, in sum; slightly negative where counted floors overshoot."""
    budget = target * len(lower) - lower.sum().item()
    if budget < -FLOOR_OVERSHOOT * len(lower):
        raise ValueError(
            f"floor: no rates with mean {target:.4f} exist; floors and box start at mean {lower.mean().item():.4f}"
        )
    return budget
