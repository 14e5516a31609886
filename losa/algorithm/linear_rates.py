"""Each linear's sparsity rate within the count of its block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from losa.algorithm.block import WrappedBlock
from losa.algorithm.ranks import allocate_ranks
from losa.algorithm.rates import MAX_RATE
from losa.distributed.processes import process_index
from losa.distributed.together import together
from losa.errors import RecipeError
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners.base import Pattern, Pruner
from losa.recipe.rates import check_counts, follows_curves
from losa.recipe.sections import AllocationConfig, PruneConfig
from losa_kernels import unpack_mask

# Statistics of a pruner that hold the norms of a linear's inputs; without any, scores are magnitudes.
WITH_NORMS = (None, "input_norms", "hessian")
# Rows of a weight that its curve is taken from, evenly spaced.
CURVE_ROWS = 256

K = TypeVar("K")


@dataclass(frozen=True)
class LinearRates:
    """By linear's name: what is kept, and the share of the linear's squared scores that is pruned; and ``ByRows``'s
    scales, where rows have rates of their own."""

    patterns: dict[str, Pattern]
    removed: dict[str, float]
    scales: dict[str, Tensor] = field(default_factory=dict)


def rates_within(
    block: WrappedBlock,
    statistics: Mapping[str, Tensor | None],
    owners: Mapping[str, int],
    sparsity: float,
    nested: bool,
    delta: float,
) -> LinearRates:
    """Rates of a block's linears, of which together as many weights go as with one rate ``sparsity``.

    Least is the share of squared scores (W + s B A)_ij^2 ||X_j||^2 that goes, averaged over the linears by their sizes
    (``counts_within``). Several processes call this together, within ``block.gathered``.

    Args:
        statistics, owners: as ``WrappedBlock.prune`` takes them; of a pruner whose statistic is one of ``WITH_NORMS``.
        nested: no linear gets a lower rate than it has reached.
        delta: half width of the box around the block's rate.
    """
    mine = [name for name in block.linears if owners[name] == process_index()]
    found = together(lambda: {name: removed_curve(block.linears[name], statistics[name], nested) for name in mine})
    curves = {name: found[owners[name]][name] for name in block.linears}
    rows = {name: linear.out_features for name, linear in block.linears.items()}
    counts = counts_within(curves, rows, sparsity, max(sparsity - delta, 0.0), min(sparsity + delta, MAX_RATE))
    return LinearRates(
        {name: Pattern(sparsity=count / block.linears[name].in_features) for name, count in counts.items()},
        {name: float(curves[name][count]) for name, count in counts.items()},
    )


def check_linear(prune: PruneConfig, allocation: AllocationConfig, pruner: Pruner) -> None:
    """Raises RecipeError for a pruner whose linears, or rows, cannot have rates of their own, and for N:M."""
    try:
        check_counts(allocation.per, prune.pattern)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if type(pruner).prune_block is not Pruner.prune_block:
        found = "which decides about whole blocks"
    elif pruner.statistic not in WITH_NORMS and not follows_curves(allocation.rates, allocation.fill):
        found = f"whose statistic {pruner.statistic!r} has no norms of inputs"
    elif allocation.per == "row" and pruner.counts == "row":
        found = "which counts in each row"
    else:
        return
    raise RecipeError(
        f"allocation.per: {allocation.per}: expected a pruner of single linears that scores weights by their inputs, "
        f"got {prune.pruner!r}, {found}"
    )


def ranks_within(rates: LinearRates, rank: int, config: AllocationConfig, sizes: list[int]) -> list[int]:
    """Ranks of a block's linears in their order, with as many parameters as if all had ``rank``: by the share of their
    squared scores that is pruned, by sparsity, or one for all, as ``config.ranks`` says of blocks. ``sizes``: the
    parameters of a rank of each."""
    if config.ranks == "uniform":
        return [rank] * len(rates.removed)
    by_sparsity = {name: pattern.target for name, pattern in rates.patterns.items()}
    shares = rates.removed if config.ranks == "error" else by_sparsity
    errors = torch.tensor([shares[name] for name in rates.patterns], dtype=torch.float64)
    return allocate_ranks(errors, rank, config.rank_min, config.rank_max, sizes).tolist()


def removed_curve(linear: MaskedLoRALinear, statistic: Tensor | None, nested: bool) -> Tensor:
    """Share of a linear's squared scores that goes with the k lowest of each row, k = 0 to in: (in + 1,) fp64 on the
    host. It is infinite below what a nested rate has reached in the average row.

    Args:
        statistic: norms of the inputs (in,), or their Hessian (in, in); None: ones.
    """
    step = -(-linear.out_features // CURVE_ROWS)
    squares = linear.dense_weight()[::step].square_()
    if statistic is not None:
        squares *= statistic.square() if statistic.dim() == 1 else statistic.diagonal().clamp_min(0)
    kept = unpack_mask(linear.mask.detach()[::step], linear.in_features) if nested else None
    curve = lowest_of_rows(squares, kept)
    curve /= curve[-1].clamp_min(torch.finfo(torch.float64).tiny)
    return floored(curve, linear.sparsity) if nested else curve


def floored(curve: Tensor, reached: float) -> Tensor:
    """A copy of a curve over rates from 0 to 1 that is infinite below a rate."""
    curve = curve.clone()
    curve[: math.ceil(reached * (len(curve) - 1) - 1e-6)] = math.inf
    return curve


def lowest_of_rows(costs: Tensor, kept: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """Sum over rows of a row's k lowest costs, k = 0 to in: (in + 1,) fp64 on the host, convex.

    Args:
        costs: (rows, in) fp32, none negative; may be overwritten.
        kept: (rows, in) bool; what a row does not keep goes first, and is in every sum, even for k = 0. None: all.
        factors: (rows,) fp64, of each row's costs; None: ones.
    """
    factors = costs.new_ones(len(costs), dtype=torch.float64) if factors is None else factors.to(costs.device)
    lost = factors.new_zeros(1)
    if kept is not None:
        lost += factors @ costs.masked_fill(kept, 0).sum(1, dtype=torch.float64)
        costs *= kept
    return _summed(factors @ costs.sort(1).values.double(), lost)


def lowest_of_all(costs: Tensor, kept: Tensor | None = None) -> Tensor:
    """As ``lowest_of_rows``, of the rows * k lowest costs of the matrix."""
    lost = costs.new_zeros(1, dtype=torch.float64)
    if kept is not None:
        lost += costs.masked_fill(kept, 0).sum(dtype=torch.float64)
        costs *= kept
    return _summed(costs.flatten().sort().values.view(-1, len(costs)).sum(1, dtype=torch.float64), lost)


def _summed(going: Tensor, lost: Tensor) -> Tensor:
    """(in + 1,): ``lost``, and what goes with each step."""
    # On the host: a GPU's cumulative sum is not the same in each run.
    return torch.cat([torch.zeros(1, dtype=torch.float64), going.cpu().cumsum(0)]) + lost.cpu()


def counts_within(
    curves: Mapping[K, Tensor], rows: Mapping[K, int], sparsity: float, low: float, high: float
) -> dict[K, int]:
    """How many weights go from each row of each linear: min sum_l rows_l in_l curve_l(k_l) with sum_l rows_l k_l the
    count that one rate for all linears gives, and rates k_l / in_l from ``low`` to ``high``.

    So a linear counts by its size: otherwise small linears would stay dense at the expense of large ones. The curves
    are convex, so the optimum takes single steps k -> k + 1 in the order of what a weight of the step costs. Where the
    next step would be too large for what the count has left, its linear takes no more; a linear with fewer rows may
    then leave its box to meet the count. The count is met exactly where all numbers of rows are multiples of the
    smallest.

    Args:
        curves: (in + 1,) fp64 each, by what is lost of the whole; infinite below the least count.
        rows: of each linear.
        sparsity: of all together, below 1.
        low, high: around it, ``high`` at most 0.99.

    Returns:
        by name; the least counts where they exceed the count together.
    """
    counts, most, left = {}, {}, 0
    for name, curve in curves.items():
        width, floor = len(curve) - 1, int(torch.isinf(curve).sum())
        counts[name] = max(floor, math.floor(low * width))
        most[name] = max(counts[name], math.floor(high * width + 1e-6))
        left += rows[name] * (math.floor(sparsity * width + 1e-6) - counts[name])
    least = dict(counts)
    steps = [
        # Of one weight: rows in (curve(k + 1) - curve(k)) / rows.
        (curve.diff() * (len(curve) - 1))[counts[name] : most[name]].numpy()
        for name, curve in curves.items()
    ]
    names = np.arange(len(steps)).repeat([len(each) for each in steps])
    names = names[np.concatenate(steps).argsort(kind="stable")]
    sizes = np.array([rows[name] for name in curves])
    fitting = np.searchsorted(sizes[names].cumsum(), left, side="right")
    for name, taken in zip(curves, np.bincount(names[:fitting], minlength=len(steps)).tolist(), strict=True):
        counts[name] += taken
        left -= taken * rows[name]
    full, smallest, by_number = set(), min(rows.values()), list(curves)
    for number in names[fitting:]:
        if left < smallest:
            break
        name = by_number[number]
        if rows[name] > left:
            full.add(name)
        if name not in full:
            counts[name] += 1
            left -= rows[name]

    def open_ones() -> list[K]:
        return [name for name, curve in curves.items() if counts[name] < MAX_RATE * (len(curve) - 1) - 1]

    def cost(name: K) -> float:
        curve, count = curves[name], counts[name]
        return float(curve[count + 1] - curve[count]) * (len(curve) - 1)

    while fits := [name for name in open_ones() if rows[name] <= left]:
        name = min(fits, key=cost)
        counts[name] += 1
        left -= rows[name]
    if left > 0 and (larger := open_ones()):
        # Linears with few rows have nothing more to lose: one with more rows takes a step, and they get weights back.
        name = min(larger, key=cost)
        back, missing = dict(counts), rows[name] - left
        back[name] += 1
        for other in sorted(curves, key=rows.__getitem__, reverse=True):
            while other != name and rows[other] <= missing and back[other] > least[other]:
                back[other] -= 1
                missing -= rows[other]
        counts = counts if missing else back
    return counts
