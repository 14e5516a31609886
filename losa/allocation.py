"""Layer-wise budgets: sparsity rates from CKA importance, ranks from reconstruction errors, keep counts for N:M."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

MAX_RATE = 0.99
# Targets come from arithmetic such as 1 - keep_n / m.
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


def cka_importance(similarity: Tensor, beta: float = 1.0) -> Tensor:
    """I_l = exp(-beta c_l / sum_k c_k) with c_l = sum_{j != l} CKA(l, j) (Eq. 4, normalised): a block that repeats what
    others carry matters less.

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


def uniform_rates(count: int, target: float) -> Tensor:
    """(count,) fp64, all ``target``: the ablation without layer-wise rates."""
    return torch.full((count,), target, dtype=torch.float64)


def cka_rates(similarity: Tensor, target: float, delta: float | None = None, floor: Tensor | None = None) -> Tensor:
    """Sparsity rate per block: min sum_l I_l s_l with mean s = target and |s_l - target| <= delta (Eq. 5).

    A linear programme with one equality, solved exactly by sorting: the least important blocks rise to their upper
    bounds until the budget ends. Ties: the first block gets sparser first.

    Args:
        similarity: (L, L) CKA.
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
    importance = cka_importance(similarity)
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


def uniform_ranks(count: int, mean_rank: int) -> Tensor:
    """(count,) int64, all ``mean_rank``: the ablation without layer-wise ranks."""
    return torch.full((count,), mean_rank, dtype=torch.int64)


def allocate_ranks(errors: Tensor, mean_rank: int, r_min: int, r_max: int) -> Tensor:
    """Ranks proportional to reconstruction errors (Eq. 7) whose sum is exactly mean_rank * L, within [r_min, r_max].

    Shares E_l / mean(E) * mean_rank are clipped, what clipping freed is shared out again in proportion, and the
    largest remainders round up (ties: the larger error, then the first block). A larger error never gets a smaller
    rank; equal errors differ by at most 1.

    Args:
        errors: (L,) non-negative, finite; all zero means uniform.

    Returns:
        (L,) int64.

    Raises:
        ValueError: bad errors or bounds.
    """
    errors = errors.double()
    if errors.dim() != 1 or len(errors) == 0:
        raise ValueError(f"errors: expected (L,), got {tuple(errors.shape)}")
    if not torch.isfinite(errors).all() or bool((errors < 0).any()):
        raise ValueError("errors: expected finite values >= 0")
    if not 1 <= r_min <= mean_rank <= r_max:
        raise ValueError(f"mean_rank: expected 1 <= r_min <= mean_rank <= r_max, got {r_min}, {mean_rank}, {r_max}")
    budget = mean_rank * len(errors)
    shares = _clipped_shares(errors, budget, r_min, r_max)
    ranks = shares.floor().long()
    remainders = shares - ranks
    # Rounded, so that equal remainders do not depend on the last bit.
    order = sorted(range(len(errors)), key=lambda i: (-round(remainders[i].item(), 9), -errors[i].item(), i))
    for index in order[: budget - int(ranks.sum())]:
        ranks[index] += 1
    return ranks


def _clipped_shares(errors: Tensor, budget: int, low: int, high: int) -> Tensor:
    """clip(lambda * errors, low, high) with the lambda that makes the sum ``budget`` (L low <= budget <= L high)."""
    largest = errors.max()
    if largest == 0:
        return torch.full_like(errors, budget / len(errors))
    # Zero errors get a vanishing share, which still takes what is left once all others have reached the upper bound.
    weights = (errors / largest).clamp_min(1e-12)
    # The sum is piecewise linear in lambda with kinks where a share meets a bound: invert it by interpolation.
    kinks = torch.cat([low / weights, high / weights]).sort().values
    totals = (kinks[:, None] * weights).clamp(low, high).sum(1)
    scale = float(np.interp(budget, totals.numpy(), kinks.numpy()))
    return (scale * weights).clamp(low, high)


def ranks_by_sparsity(rates: Tensor, mean_rank: int, r_min: int, r_max: int) -> Tensor:
    """The ablation that gives sparser blocks higher ranks: ``allocate_ranks`` on the rates (L,) as errors."""
    return allocate_ranks(rates, mean_rank, r_min, r_max)


def allocate_keep_n(
    importance: Tensor,
    mean_keep: float,
    m: int,
    delta: float | None = None,
    lo: int = 1,
    hi: int | None = None,
    ceiling: Tensor | None = None,
) -> Tensor:
    """Kept weights per group of m for every block: more important blocks keep more, the sum is mean_keep * L rounded
    half up.

    Integers cannot follow Eq. 5's box of +-delta; they follow its total deviation instead: the counts next to the
    mean go out by importance, then round(L delta m / 2) pairs of blocks, most against least important, move one weight
    from the less to the more important. Without ceilings every count lies in floor(mean) - 1 .. ceil(mean) + 1.

    Args:
        importance: (L,); ties: later blocks lose first, and no pair of equals moves a weight.
        mean_keep: mean of the counts.
        delta: of Eq. 5; default ``default_delta(1 - mean_keep / m)``; 0 keeps blocks next to the mean.
        lo, hi: hard bounds, 1..m by default.
        ceiling: (L,) keep counts already reached, above which nested masks cannot go; it goes before ``lo``.

    Returns:
        (L,) int64.

    Raises:
        ValueError: bad values, or bounds or ceilings that leave no solution.
    """
    if importance.dim() != 1 or len(importance) == 0 or not torch.isfinite(importance).all():
        raise ValueError(f"importance: expected finite (L,), got {tuple(importance.shape)}")
    if not 0 < mean_keep <= m:
        raise ValueError(f"mean_keep: expected 0 < mean_keep <= m={m}, got {mean_keep}")
    delta = default_delta(1 - mean_keep / m) if delta is None else delta
    hi = m if hi is None else hi
    if not 0 <= lo <= hi <= m:
        raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= m={m}, got {lo}, {hi}")
    count = len(importance)
    total = math.floor(mean_keep * count + 0.5)
    high = [hi] * count
    if ceiling is not None:
        if tuple(ceiling.shape) != (count,):
            raise ValueError(f"ceiling: expected ({count},), got {tuple(ceiling.shape)}")
        high = [min(hi, c) for c in ceiling.tolist()]
    low = [min(lo, h) for h in high]
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"mean_keep: no counts with sum {total} exist for {count} blocks between {low} and {high}")
    values = importance.tolist()
    order = importance.double().argsort(descending=True, stable=True).tolist()
    counts = _even_counts(total, low, high, order)
    # Beyond one step from the mean only where ceilings force it.
    least, most = total // count - 1, -(-total // count) + 1
    gaining = [i for i in order if counts[i] < min(high[i], most)]
    losing = [i for i in reversed(order) if counts[i] > max(low[i], least)]
    for gain, loss in list(zip(gaining, losing, strict=False))[: round(count * delta * m / 2)]:
        if values[gain] <= values[loss]:
            break
        counts[gain] += 1
        counts[loss] -= 1
    return torch.tensor(counts, dtype=torch.int64)


def _even_counts(total: int, low: list[int], high: list[int], order: list[int]) -> list[int]:
    """Integers as equal as the bounds allow with sum ``total``; ``order`` (most important first) settles the rest."""
    base = total // len(order)
    counts = [min(max(base, a), b) for a, b in zip(low, high, strict=True)]
    while (left := total - sum(counts)) != 0:
        # One more for the most important, or one less for the least, always at the level that evens out.
        step, blocks = (1, order) if left > 0 else (-1, order[::-1])
        fits = [i for i in blocks if low[i] <= counts[i] + step <= high[i]]
        level = min(step * counts[i] for i in fits)
        for i in [i for i in fits if step * counts[i] == level][: abs(left)]:
            counts[i] += step
    return counts
