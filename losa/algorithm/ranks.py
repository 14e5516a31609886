"""Each block's rank, from reconstruction errors or from sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from losa.recipe.sections import AllocationConfig


def uniform_ranks(count: int, mean_rank: int) -> Tensor:
    """(count,) int64, all ``mean_rank``: the ablation without layer-wise ranks."""
    return torch.full((count,), mean_rank, dtype=torch.int64)


def allocate_ranks(
    errors: Tensor, mean_rank: int, r_min: int, r_max: int, sizes: Sequence[int] | None = None
) -> Tensor:
    """Ranks proportional to reconstruction errors (Eq. 7), within [r_min, r_max], with as many parameters as if all had
    the mean rank.

    Shares E_l / mean(E) * mean_rank are clipped, ranks that clipping frees are shared out again in proportion, and the
    largest remainders round up (ties: the larger error, then the first block), as long as there are parameters for it.
    So the ranks' sum is exactly mean_rank * L where all sizes are alike, and else less than one rank of the largest
    size is left. A larger error never gets a smaller rank; equal errors differ by at most 1.

    Args:
        errors: (L,) non-negative, finite; all zero means uniform.
        sizes: the parameters of a rank of each, (in + out) of its linears; None: alike.

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
    sizes = [1] * len(errors) if sizes is None else list(sizes)
    if len(sizes) != len(errors) or min(sizes) < 1:
        raise ValueError(f"sizes: expected {len(errors)} whole numbers >= 1, got {sizes}")
    budget = mean_rank * sum(sizes)
    shares = _clipped_shares(errors, torch.tensor(sizes, dtype=torch.float64), budget, r_min, r_max)
    ranks = shares.floor().long()
    remainders = shares - ranks
    # Rounded, so that equal remainders do not depend on the last bit.
    order = sorted(range(len(errors)), key=lambda i: (-round(remainders[i].item(), 9), -errors[i].item(), i))
    left = budget - sum(size * rank for size, rank in zip(sizes, ranks.tolist(), strict=True))
    for index in order:
        left -= sizes[index]
        if left < 0:
            break
        ranks[index] += 1
    return ranks


def _clipped_shares(errors: Tensor, sizes: Tensor, budget: int, low: int, high: int) -> Tensor:
    """clip(lambda * errors, low, high) with the lambda that makes their sum, weighted by ``sizes``, ``budget``, which
    lies between those of ``low`` and of ``high``."""
    largest = errors.max()
    if largest == 0:
        return (budget / sizes.sum()).expand(len(errors))
    # A zero error gets a vanishing share, which takes the remaining budget once all other shares are at ``high``.
    weights = (errors / largest).clamp_min(1e-12)
    # The sum is piecewise linear in lambda with kinks where a share meets a bound: invert it by interpolation.
    kinks = torch.cat([low / weights, high / weights]).sort().values
    totals = (kinks[:, None] * weights).clamp(low, high) @ sizes
    scale = float(np.interp(budget, totals.numpy(), kinks.numpy()))
    return (scale * weights).clamp(low, high)


def ranks_by_sparsity(
    rates: Tensor, mean_rank: int, r_min: int, r_max: int, sizes: Sequence[int] | None = None
) -> Tensor:
    """The ablation that gives sparser blocks higher ranks: ``allocate_ranks`` on the rates (L,) as errors."""
    return allocate_ranks(rates, mean_rank, r_min, r_max, sizes)


def ranks_of_blocks(
    config: AllocationConfig, mean_rank: int, errors: list[float] | None, sparsity: list[float], sizes: list[int]
) -> list[int]:
    """The rank of each block, as ``config.ranks`` says.

    Args:
        mean_rank: Omega_t.
        errors: E_l of every block, for ``error``.
        sparsity: share of pruned weights of every block.
        sizes: the parameters of a rank of every block.
    """
    bounds = (mean_rank, config.rank_min, config.rank_max, sizes)
    if config.ranks == "error":
        ranks = allocate_ranks(torch.tensor(errors, dtype=torch.float64), *bounds)
    elif config.ranks == "sparsity":
        ranks = ranks_by_sparsity(torch.tensor(sparsity, dtype=torch.float64), *bounds)
    else:
        ranks = uniform_ranks(len(sparsity), mean_rank)
    return ranks.tolist()
