"""Each block's sparsity rate, from its importance."""

from __future__ import annotations

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
    if importance.dim() != 1 or len(importance) == 0 or not torch.isfinite(importance).all():
        raise ValueError(f"importance: expected finite (L,), got {tuple(importance.shape)}")
    count = len(importance)
    if not 0 <= target <= MAX_RATE:
        raise ValueError(f"target: expected 0 <= target <= {MAX_RATE}, got {target}")
    delta = default_delta(target) if delta is None else delta
    if delta < 0:
        raise ValueError(f"delta: expected >= 0, got {delta}")
    lower = uniform_rates(count, max(target - delta, 0.0))
    upper = uniform_rates(count, min(target + delta, MAX_RATE))
    if floor is not None:
        if tuple(floor.shape) != (count,):
            raise ValueError(f"floor: expected ({count},), got {tuple(floor.shape)}")
        if not bool(((floor >= 0) & (floor <= 1)).all()):
            raise ValueError(f"floor: expected rates in [0, 1], got {floor.tolist()}")
        lower = torch.maximum(lower, floor.to(lower))
        upper = torch.maximum(upper, lower)
    budget = target * count - lower.sum().item()
    if budget < -FLOOR_OVERSHOOT * count:
        raise ValueError(
            f"floor: no rates with mean {target:.4f} exist; floors and box start at mean {lower.mean().item():.4f}"
        )
    rates = lower.clone()
    for index in importance.argsort(stable=True).tolist():
        step = min(max(budget, 0.0), (upper - lower)[index].item())
        rates[index] += step
        budget -= step
    return rates
