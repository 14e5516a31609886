"""Layer-wise budgets: sparsity rates from CKA importance, ranks from reconstruction errors, keep counts for N:M."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_RATE = 0.99


def default_delta(target: float) -> float:
    """Half width of the box around ``target``: the paper's .01/.02/.03 up to .5/.6/.7, then 0.1 (1 - target), which
    continues at .7 and keeps every rate below 1.

    Raises ValueError outside [0, 0.95].
    """
    if not 0 <= target <= 0.95:
        raise ValueError(f"target: expected 0 <= target <= 0.95, got {target}")
    for limit, delta in ((0.5, 0.01), (0.6, 0.02), (0.7, 0.03)):
        if target <= limit + 1e-12:
            return delta
    return 0.1 * (1 - target)


def cka_importance(similarity: Tensor, beta: float = 1.0) -> Tensor:
    """I_l = exp(-beta c_l / sum_k c_k) with c_l = sum_{j != l} CKA(l, j) (Eq. 4, normalised): a block that repeats what
    others carry matters less. ``similarity`` (L, L) -> (L,) fp64. The rates depend on the order only, not on beta."""
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: expected (L, L), got {tuple(similarity.shape)}")
    if not torch.isfinite(similarity).all():
        raise ValueError("similarity: expected finite values")
    similarity = similarity.double()
    redundancy = similarity.sum(1) - similarity.diagonal()
    total = redundancy.sum()
    return torch.exp(-beta * redundancy / total) if total != 0 else torch.ones_like(redundancy)


def cka_rates(similarity: Tensor, target: float, delta: float | None = None, floor: Tensor | None = None) -> Tensor:
    """Sparsity rate per block: min sum_l I_l s_l with mean s = target and |s_l - target| <= delta (Eq. 5).

    A linear programme with one equality: fill the least important blocks to their upper bounds until the budget ends.

    Args:
        similarity: (L, L) CKA.
        target: theta_t, the mean rate.
        delta: half width of the box; default ``default_delta(target)``.
        floor: (L,) rates already reached, below which nested masks cannot go.

    Returns:
        (L,) fp64 with mean exactly ``target`` (to rounding).

    Raises:
        ValueError: bad shapes or values, or a floor that leaves no solution.
    """
    importance = cka_importance(similarity)
    count = len(importance)
    delta = default_delta(target) if delta is None else delta
    lower = torch.full((count,), max(target - delta, 0.0), dtype=torch.float64)
    upper = torch.full((count,), min(target + delta, MAX_RATE), dtype=torch.float64)
    if floor is not None:
        if tuple(floor.shape) != (count,):
            raise ValueError(f"floor: expected ({count},), got {tuple(floor.shape)}")
        lower = torch.maximum(lower, floor.double())
        upper = torch.maximum(upper, lower)
    budget = target * count - lower.sum().item()
    # Floors come from counted masks, which round by at most a weight per row.
    if budget < -1e-3 * count or budget > (upper - lower).sum().item() + 1e-9:
        raise ValueError(f"floor: no rates with mean {target:.4f} exist; floors have mean {lower.mean().item():.4f}")
    rates = lower.clone()
    for index in torch.argsort(importance, stable=True).tolist():
        step = min(max(budget, 0.0), (upper - lower)[index].item())
        rates[index] += step
        budget -= step
    return rates


def uniform_ranks(count: int, mean_rank: int) -> Tensor:
    """(count,) int64, all ``mean_rank``."""
    return torch.full((count,), mean_rank, dtype=torch.int64)


def allocate_ranks(errors: Tensor, mean_rank: int, r_min: int, r_max: int) -> Tensor:
    """Ranks proportional to reconstruction errors (Eq. 7) whose sum is exactly mean_rank * L, within [r_min, r_max].

    Shares E_l / mean(E) * mean_rank are clipped, what clipping freed is shared out again in proportion, and the
    largest remainders round up (ties: the first block). A larger error never gets a smaller rank.

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
    shares = _bounded_shares(errors, budget, r_min, r_max)
    ranks = shares.floor().long()
    left = budget - int(ranks.sum())
    remainders = (shares - ranks).masked_fill(ranks >= r_max, -1)
    # Equal shares go by the larger error first, so that rounding keeps the order.
    order = sorted(range(len(errors)), key=lambda i: (-round(remainders[i].item(), 9), -errors[i].item(), i))
    for index in order[:left]:
        ranks[index] += 1
    return ranks


def _bounded_shares(errors: Tensor, budget: int, low: int, high: int) -> Tensor:
    """lambda * errors clipped to [low, high] with the sum ``budget``: bisection on lambda, then the exact piece."""
    if errors.max() == 0:
        return torch.full_like(errors, budget / len(errors))
    errors = errors.clamp_min(errors.max().item() * 1e-12)
    below, above = 0.0, high / errors.min().item()
    for _ in range(200):
        middle = (below + above) / 2
        if (errors * middle).clamp(low, high).sum() < budget:
            below = middle
        else:
            above = middle
    shares = (errors * above).clamp(low, high)
    free = (shares > low) & (shares < high)
    if free.any():
        shares[free] += (budget - shares.sum()) * errors[free] / errors[free].sum()
    nearest = shares.round()
    return torch.where((shares - nearest).abs() < 1e-6, nearest, shares).clamp(low, high)


def ranks_by_sparsity(rates: Tensor, mean_rank: int, r_min: int, r_max: int) -> Tensor:
    """The ablation that gives sparser blocks higher ranks: ``allocate_ranks`` on the rates."""
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
    """Kept weights per group of m for every block: more important blocks keep more, the sum is round(mean_keep * L).

    Integers cannot follow Eq. 5's box of +-delta; they follow its total deviation instead: the counts next to the
    mean go out by importance, then round(L delta m / 2) of the most important blocks keep one more and as many of the
    least important keep one less.

    Args:
        importance: (L,); ties: later blocks lose first.
        delta: of Eq. 5; default ``default_delta(1 - mean_keep / m)``; 0 keeps blocks next to the mean.
        lo, hi: hard bounds, 1..m by default.
        ceiling: (L,) keep counts already reached, above which nested masks cannot go.

    Returns:
        (L,) int64.

    Raises:
        ValueError: bounds or ceilings that leave no solution.
    """
    count = len(importance)
    if not 0 < mean_keep <= m:
        raise ValueError(f"mean_keep: expected 0 < mean_keep <= m={m}, got {mean_keep}")
    delta = default_delta(1 - mean_keep / m) if delta is None else delta
    total = math.floor(mean_keep * count + 0.5)
    high = [m if hi is None else hi] * count
    if ceiling is not None:
        high = [min(h, int(c)) for h, c in zip(high, ceiling, strict=True)]
    low = [min(lo, h) for h in high]
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"mean_keep: no counts with sum {total} exist for {count} blocks between {low} and {high}")
    order = torch.argsort(importance.double(), descending=True, stable=True).tolist()
    counts = [min(max(total // count, a), b) for a, b in zip(low, high, strict=True)]
    while (left := total - sum(counts)) != 0:
        # One more for the most important, or one less for the least, until the budget is met.
        step, blocks = (1, order) if left > 0 else (-1, order[::-1])
        fits = [i for i in blocks if low[i] <= counts[i] + step <= high[i]]
        level = min(step * counts[i] for i in fits)
        for i in [i for i in fits if step * counts[i] == level][: abs(left)]:
            counts[i] += step
    moves = round(count * delta * m / 2)
    up = [i for i in order[: count // 2] if counts[i] < high[i]][:moves]
    down = [i for i in order[::-1][: count // 2] if counts[i] > low[i]][: len(up)]
    for gain, loss in zip(up, down, strict=False):
        counts[gain] += 1
        counts[loss] -= 1
    return torch.tensor(counts, dtype=torch.int64)
