"""Each block's keep count, for N:M patterns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losa.algorithm.rates import default_delta


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
        ceiling: (L,) keep counts already reached, above which nested masks cannot go; it overrides ``lo``.

    Returns:
        (L,) int64.

    Raises:
        ValueError: bad values, or bounds or ceilings that leave no solution.
    """
    if importance.dim() != 1 or len(importance) == 0:
        raise ValueError(f"importance: expected (L,), got {tuple(importance.shape)}")
    if not torch.isfinite(importance).all():
        raise ValueError(f"importance: expected finite values, got {importance.tolist()}")
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
    """Integers as equal as the bounds allow, with sum ``total``. ``order``: most important block first."""
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
