"""What each block is to keep in a round, decided before the pass that prunes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from losa.algorithm.block import WrappedBlock
from losa.algorithm.expected_loss import Energies
from losa.algorithm.importance import get_importance
from losa.algorithm.linear_rates import LinearRates
from losa.algorithm.loss_rates import rates_of_blocks, rates_of_linears
from losa.algorithm.measures import MEASURES, Measured, losses
from losa.algorithm.patterns import patterns_for
from losa.algorithm.rates import default_delta
from losa.algorithm.row_scales import row_scales
from losa.algorithm.schedule import Round
from losa.algorithm.stream import BlockStream
from losa.algorithm.widths import best_width
from losa.distributed.collectives import from_rank_zero
from losa.errors import RecipeError
from losa.pruners.base import Pattern
from losa.recipe.rates import RATES, TRIED_WIDTHS, compares_samples, follows_curves, tries_widths
from losa.recipe.sections import AllocationConfig, PruneConfig


@dataclass(frozen=True)
class Decided:
    """Patterns of all blocks; importance (L,) and CKA (L, L), fp64 on the host, where needed; the half width of the
    box, where losses chose it; and rates of all linears, block by block, where all were decided together: each block's
    pattern is then the mean of all."""

    patterns: list[Pattern]
    importance: Tensor | None
    similarity: Tensor | None
    delta: float | None = None
    linears: list[LinearRates] | None = None


class BlockRates:
    """Decides the rates of a wrapped model's blocks, as the recipe's ``allocation`` says.

    Args:
        blocks: of the model.
        prefix: what the blocks' names begin with.
        open_stream: makes a new stream of the samples that serve rates.
        energies: takes those of all linears on these samples.
        prune: the recipe's section, as is ``allocation``.
        loss: of the model as it is on these samples; needed where it chooses the width of the box.

    Raises:
        RecipeError: the width needs a loss, and there is none.
    """

    def __init__(
        self,
        blocks: Sequence[WrappedBlock],
        prefix: str,
        open_stream: Callable[[], BlockStream],
        energies: Callable[[], Mapping[str, Energies]],
        prune: PruneConfig,
        allocation: AllocationConfig,
        loss: Callable[[], float] | None,
    ):
        self._prune, self._allocation, self._loss = prune, allocation, loss
        self._function = get_importance(allocation.rates)
        self._by_curves = follows_curves(allocation.rates, allocation.fill) and prune.pattern is None
        self.measured = Measured(blocks, prefix, open_stream, energies)
        if loss is None and tries_widths(allocation.rates, allocation.delta):
            raise RecipeError(
                f"allocation.rates: {allocation.rates!r} chooses its width by a loss: expected allocation.delta, or an "
                "engine with a loss"
            )

    def decide(self, this_round: Round) -> Decided:
        """The patterns of a round. Several processes call it together, in evaluation mode and without gradients.

        Raises:
            Stopped: between two blocks that are compared, if a signal asks for it.
            NumericsError: non-finite statistics; names the block.
        """
        count, name = len(self.measured.blocks), self._allocation.rates
        if self._by_curves:
            return self._least_loss(this_round)
        if count == 1:
            return Decided(self._patterns(this_round, None)[0], None, None)
        found = MEASURES[RATES[name].needs](self.measured)
        importance = self._importance(found)
        patterns, delta = self._patterns(this_round, importance)
        return Decided(patterns, importance, found if compares_samples(name) else None, delta)

    def _importance(self, found: Any) -> Tensor | None:
        """Importance of the blocks, None where all are pruned alike. ``found``: what it needs."""
        count, name = len(self.measured.blocks), self._allocation.rates
        importance = self._function(found)
        if importance is None:
            return None
        if tuple(importance.shape) != (count,):
            shape = tuple(importance.shape)
            raise ValueError(f"allocation.rates {name!r}: expected importance ({count},), got {shape}")
        if isinstance(importance, DTensor):  # made of a sharded model's parameters
            importance = importance.full_tensor()
        return from_rank_zero(importance.double().cpu())

    def _least_loss(self, this_round: Round) -> Decided:
        """Rates of the least expected loss: of linears where they may differ, else of blocks. No block's importance
        takes part."""
        delta = RATES[self._allocation.rates].delta if self._allocation.delta is None else self._allocation.delta
        width = default_delta(this_round.sparsity) if isinstance(delta, str) else delta
        blocks, by_rows = self.measured.blocks, self._allocation.per == "row"
        curves = losses(self.measured, self._prune.decisions_nested, by_rows)
        how = blocks, curves, this_round.sparsity, width, self._prune.rates_nested
        if self._allocation.per == "block":
            return Decided([Pattern(sparsity=rate) for rate in rates_of_blocks(*how)], None, None)
        mean = [Pattern(sparsity=this_round.sparsity)] * len(blocks)
        linears = rates_of_linears(*how)
        if by_rows:
            energies = self.measured.energies()
            named = zip(blocks, linears, strict=True)
            linears = [
                replace(
                    own, scales={name: row_scales(energies[f"{block.name}.{name}"].outputs) for name in own.patterns}
                )
                for block, own in named
            ]
        return Decided(mean, None, None, linears=linears)

    def _patterns(self, this_round: Round, importance: Tensor | None) -> tuple[list[Pattern], float | None]:
        """Patterns of all blocks; and the half width of their box, where losses chose it."""
        row, config = RATES[self._allocation.rates], self._allocation
        fill, reached = config.fill or row.fill, [block.sparsity() for block in self.measured.blocks]

        def within(delta: float | None) -> list[Pattern]:
            return patterns_for(this_round, importance, reached, self._prune, delta, fill)

        if importance is None or not tries_widths(config.rates, config.delta):
            # A box about expected losses is too wide for what follows importance.
            default = None if isinstance(row.delta, str) or row.fill == "curves" else row.delta
            return within(default if config.delta is None else config.delta), None
        widest = min(this_round.sparsity, 1 - this_round.sparsity)
        # Of widths that give the same patterns, as keep counts of N:M may be, the smallest is tried.
        widths: dict[tuple[Pattern, ...], float] = {}
        for share in TRIED_WIDTHS:
            widths.setdefault(tuple(within(share * widest)), share * widest)
        tried = {width: list(patterns) for patterns, width in widths.items()}
        if len(tried) == 1:
            return next(iter(tried.values())), None
        assert self._loss is not None, "the constructor saw to it"
        width = best_width(self.measured, tried, self._prune.rates_nested, self._loss)
        return tried[width], width
