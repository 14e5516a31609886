"""Pruned weights that come back by the gradient of the loss, in place of kept weights that the pruner gives up: what
RigL (Evci et al. 2020) does with |g|, by the first-order change of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from losa.errors import NumericsError, RecipeError
from losa.pruners.base import Pattern, Pruned, Pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, unpack_mask
from losa_kernels.pruning.reference import prune_count, smallest
from losa_kernels.tensors import all_finite

# What the pruner decides about one linear, for a pattern and a mask so far.
_Decide = Callable[[Pattern, Tensor], Pruned]


def check_regrowth(prune: PruneConfig, pruner: Pruner) -> None:
    """Raises RecipeError for a pruner whose masks cannot be changed weight by weight."""
    if prune.regrow_by != "gradient":
        return
    expected = f"prune.regrow_by: gradient brings single weights back; prune.pruner {prune.pruner!r}"
    if type(pruner).prune_block is not Pruner.prune_block:
        raise RecipeError(f"{expected} decides about whole blocks")
    if prune.pattern is not None and pruner.updates_weight:
        raise RecipeError(f"{expected} changes kept weights, so that with prune.pattern no other choice fits to them")


class Regrowing(Pruner):
    """A pruner of single linears that gives up more kept weights than the pattern asks for, so that as many pruned ones
    come back.

    With g the gradient of the loss with respect to an entry of the effective weight and w the dense value W + s B A,
    the loss changes by g w, to first order, when a pruned weight returns. The smallest (most negative) changes return:
    as many in every row, if the pruner leaves as many in every row, else of the whole matrix; for N:M one in each of
    the groups where it is smallest. Counts are the pattern's, and ties go lowest column first. A weight that the pruner
    gives up does not return in the same round.

    Args:
        pruner: has no ``prune_block`` of its own.
        gradients: sums over samples by linear, (out, in) fp32.
        value: gives W + s B A of a linear, (out, in) fp32.
        share: of the kept weights that are exchanged, rounded down for each row; fewer where fewer are pruned.
    """

    def __init__(self, pruner: Pruner, gradients: Mapping[str, Tensor], value: Callable[[str], Tensor], share: float):
        self.updates_weight = pruner.updates_weight
        self._pruner, self._gradients, self._value, self._share = pruner, gradients, value, share

    def prune_block(
        self,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern,
        masks: Mapping[str, Tensor | None],
    ) -> Iterator[tuple[str, Pruned]]:
        self._pruner.prepare(statistics.values())
        for name in weights:
            gradient, value, mask = self._gradients[name], self._value(name), masks[name]
            assert mask is not None
            if not all_finite(gradient):
                raise NumericsError(f"{name}: gradients: expected finite values, got nan or inf")
            kept = unpack_mask(mask, value.shape[1])
            change = (gradient * value).masked_fill_(kept, torch.inf)
            exchange = _exchange_by_rows if pattern.m is None else _exchange_by_groups
            decide = partial(self._pruner._prune_named, name, weights[name], statistics[name])
            pruned, back = exchange(decide, pattern, mask, change, self._share)
            if pruned.weight is not None:
                pruned.weight = torch.where(back, value, pruned.weight)
            yield name, pruned


def _exchange_by_rows(
    decide: _Decide, pattern: Pattern, mask: Tensor, change: Tensor, share: float
) -> tuple[Pruned, Tensor]:
    """The outcome, with the weights that return in its mask; and these weights, bool (out, in). ``change``: of the
    loss, infinite where ``mask`` keeps."""
    sparsity, (rows, columns) = pattern.target, change.shape
    lost = change.isfinite().sum(1)
    kept_of_row = columns - prune_count(sparsity, columns)
    count = min(int(share * kept_of_row), int(lost.sum()) // rows)
    # Whether the pruner counts by rows or over the matrix, it gives up rows x count more.
    pruned = decide(Pattern(sparsity=sparsity + count / columns), mask)
    left = unpack_mask(pruned.mask, columns)
    kept = left.sum(1)
    if bool((lost == lost[0]).all() & (kept == kept[0]).all()):
        back = smallest(change, kept_of_row - int(kept[0]))
    else:
        total = change.numel() - prune_count(sparsity, change.numel())
        # A pruner that counts by rows may keep a few more than the matrix as a whole is to.
        back = smallest(change.view(1, -1), max(0, total - int(kept.sum()))).view_as(change)
    pruned.mask = pack_mask(left | back)
    return pruned, back


def _exchange_by_groups(
    decide: _Decide, pattern: Pattern, mask: Tensor, change: Tensor, share: float
) -> tuple[Pruned, Tensor]:
    """``_exchange_by_rows`` for N:M and a pruner that changes no weights."""
    assert pattern.keep_n is not None and pattern.m is not None
    keep_n, m, (rows, columns) = pattern.keep_n, pattern.m, change.shape
    groups = change.view(rows, -1, m)
    smallest_of_group = groups.amin(2)
    count = min(int(share * keep_n * (columns // m)), columns // m)
    exchanged = smallest(smallest_of_group, count) & smallest_of_group.isfinite()
    pruned = decide(pattern, mask)
    left = unpack_mask(pruned.mask, columns).view_as(groups)
    if keep_n > 1:
        fewer = unpack_mask(decide(Pattern(keep_n=keep_n - 1, m=m), pruned.mask).mask, columns).view_as(groups)
    else:
        fewer = torch.zeros_like(left)
    left = torch.where(exchanged[..., None], fewer, left)
    place = groups.argsort(dim=2, stable=True).argsort(dim=2)
    back = (place < keep_n - left.sum(2, keepdim=True)) & groups.isfinite()
    pruned.mask = pack_mask((left | back).view_as(change))
    return pruned, back.view_as(change)
