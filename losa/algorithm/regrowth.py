"""Pruned weights that come back by the gradient of the loss, in place of kept weights that the pruner gives up: what
RigL (Evci et al. 2020) does with |g|, by the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from losa.errors import NumericsError, RecipeError
from losa.pruners.base import Pattern, Pruned, Pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, unpack_mask
from losa_kernels.pruning.reference import prune_count, smallest, smallest_of_groups
from losa_kernels.tensors import all_finite

# What the pruner keeps of one linear, bool (out, in), for a pattern and what may stay.
_Decide = Callable[[Pattern, Tensor], Tensor]


def check_regrowth(prune: PruneConfig, pruner: Pruner) -> None:
    """Raises RecipeError for a pruner whose masks cannot be changed weight by weight."""
    if prune.regrow_by != "gradient":
        return
    expected = f"prune.regrow_by: gradient brings single weights back; prune.pruner {prune.pruner!r}"
    if type(pruner).prune_block is not Pruner.prune_block:
        raise RecipeError(f"{expected} decides about whole blocks")
    if pruner.updates_weight:
        raise RecipeError(f"{expected} changes kept weights, which then make up for the pruned ones already")


class Regrowing(Pruner):
    """A pruner of single linears whose kept weights are exchanged for pruned ones where that lowers the loss.

    With g the gradient of the loss with respect to an entry of the effective weight and w the dense value W + s B A,
    the loss changes by g w, to first order, when a pruned weight returns, and by -g w when a kept one leaves. The
    pruner's score decides which kept weights may leave: those that it gives up for a higher rate. The best of them and
    the pruned weight with the smallest g w are a pair, the second best of both are the next one, and so on. A pair is
    exchanged if g w of the pruned weight and the sum of the pair's changes are negative. Where the pattern asks for
    more than the mask keeps, the smallest g w return without a pair. Pairs are formed in each row or over the matrix,
    as the pruner counts; of N:M groups one pair each, in the groups of a row whose pairs lower the loss most. Counts
    are the pattern's, and ties go lowest column first. A weight that the pruner gives up does not return in the same
    round.

    Args:
        pruner: changes no weights, and has no ``prune_block`` of its own.
        gradients: sums over samples by linear, (out, in) fp32.
        share: of the kept weights that may be exchanged, rounded down for each row, or for the matrix. The engine lets
            it fall to 0 in the last round, after which weights that return would hardly be trained.
    """

    def __init__(self, pruner: Pruner, gradients: Mapping[str, Tensor], share: float):
        self._pruner, self._gradients, self._share = pruner, gradients, share

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        self._pruner.prepare(statistics)

    def prune_block(
        self,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern,
        masks: Mapping[str, Tensor | None],
    ) -> Iterator[tuple[str, Pruned]]:
        self.prepare(statistics.values())
        for name in weights:
            weight, gradient, mask = weights[name], self._gradients[name], masks[name]
            assert mask is not None
            if not all_finite(gradient):
                raise NumericsError(f"{name}: gradients: expected finite values, got nan or inf")
            decide = partial(self._decide, name, weight, statistics[name])
            before, effect = unpack_mask(mask, weight.shape[1]), gradient * weight
            if pattern.m is not None:
                kept = _exchange_in_groups(decide, pattern, before, effect, self._share)
            else:
                lines = (1, -1) if self._pruner.counts == "matrix" else weight.shape
                kept = _exchange_in_lines(decide, pattern.target, before, effect, self._share, lines)
            yield name, Pruned(pack_mask(kept))

    def _decide(self, name: str, weight: Tensor, statistic: Tensor | None, pattern: Pattern, stays: Tensor) -> Tensor:
        pruned = self._pruner.prune_named(name, weight, statistic, pattern, pack_mask(stays))
        return unpack_mask(pruned.mask, weight.shape[1])


def _exchange_in_lines(
    decide: _Decide, sparsity: float, before: Tensor, effect: Tensor, share: float, lines: Sequence[int]
) -> Tensor:
    """What is kept, bool (out, in). ``before``: what was kept; ``effect``: g w, (out, in); ``lines``: the shape whose
    rows are what the pruner counts by."""
    pruned, effect = ~before.view(lines), effect.view(lines)
    count, size = effect.shape
    wanted = size - prune_count(sparsity, size)
    most = min(int(share * wanted), int(pruned.sum()) // count)
    stays = decide(Pattern(sparsity=sparsity), before)
    fewer = decide(Pattern(sparsity=sparsity + most / size), stays).view(lines)
    stays = stays.view(lines)
    missing, may_leave = wanted - stays.sum(1, keepdim=True), stays & ~fewer
    pairs = may_leave.sum(1, keepdim=True)
    least, longest, returning = torch.stack([missing.min(), pairs.max(), (missing + pairs).max()]).tolist()
    if least < 0:
        raise ValueError(f"counts: expected at most {wanted} of {size} weights, {-least} more are kept")
    gains, back = _lowest(effect.masked_fill(~pruned, torch.inf), returning)
    costs, leaving = _lowest((-effect).masked_fill_(~may_leave, torch.inf), longest)
    costs = torch.cat([costs, costs.new_full((count, 1), torch.inf)], 1)
    pair = torch.arange(returning, device=effect.device) - missing
    lowers = (gains < 0) & (gains + costs.gather(1, pair.clamp(0, longest)) < 0)
    returns = (pair < 0) | lowers
    leaves = torch.arange(longest, device=effect.device) < returns.sum(1, keepdim=True) - missing
    nothing = torch.zeros_like(stays)
    kept = stays & ~nothing.scatter(1, leaving, leaves) | nothing.scatter(1, back, returns)
    return kept.view_as(before)


def _lowest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` lowest values of each row in ascending order, and their columns; ties lowest column first."""
    columns = smallest(values, count).nonzero()[:, 1].view(len(values), count)
    found = values.gather(1, columns).sort(dim=1, stable=True)
    return found.values, columns.gather(1, found.indices)


def _exchange_in_groups(decide: _Decide, pattern: Pattern, before: Tensor, effect: Tensor, share: float) -> Tensor:
    """``_exchange_in_lines`` for N:M."""
    assert pattern.keep_n is not None and pattern.m is not None
    keep_n, m, (rows, columns) = pattern.keep_n, pattern.m, effect.shape
    stays = decide(pattern, before)
    fewer = decide(Pattern(keep_n=keep_n - 1, m=m), stays) if keep_n > 1 else torch.zeros_like(stays)
    grouped = (rows, columns // m, m)
    may_leave, stays = (stays & ~fewer).view(grouped), stays.view(grouped)
    effect = effect.view(grouped)
    gains = effect.masked_fill(before.view(grouped), torch.inf)
    best = gains.amin(2)
    change = best + (-effect).masked_fill_(~may_leave, torch.inf).amin(2)
    change.masked_fill_(best >= 0, torch.inf)
    exchanged = smallest(change, min(int(share * keep_n * (columns // m)), columns // m)) & (change < 0)
    stays = stays & ~(may_leave & exchanged[..., None])
    back = smallest_of_groups(gains.view(-1, m).T, keep_n - stays.view(-1, m).sum(1)).T.view(grouped)
    return (stays | back).view_as(before)
