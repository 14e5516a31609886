"""What each block is to keep in a round, decided before the pass that prunes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from losa.algorithm.block import WrappedBlock
from losa.algorithm.importance import get_importance
from losa.algorithm.measures import MEASURES, Measured
from losa.algorithm.patterns import patterns_for
from losa.algorithm.schedule import Round
from losa.algorithm.stream import BlockStream
from losa.algorithm.widths import best_width
from losa.distributed.collectives import from_rank_zero
from losa.errors import RecipeError
from losa.pruners.base import Pattern
from losa.recipe.rates import RATES, TRIED_WIDTHS, compares_samples, tries_widths
from losa.recipe.sections import AllocationConfig, PruneConfig


@dataclass(frozen=True)
class Decided:
    """Patterns of all blocks; importance (L,) and CKA (L, L), fp64 on the host, where needed; and the half width
    of the box, where losses chose it."""

    patterns: list[Pattern]
    importance: Tensor | None
    similarity: Tensor | None
    delta: float | None


class BlockRates:
    """Decides the rates of a wrapped model's blocks, as the recipe's ``allocation`` says.

    Args:
        blocks: of the model.
        prefix: what the blocks' names begin with.
        open_stream: makes a new stream of the samples that serve rates.
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
        prune: PruneConfig,
        allocation: AllocationConfig,
        loss: Callable[[], float] | None,
    ):
        self._prune, self._allocation, self._loss = prune, allocation, loss
        self._function = get_importance(allocation.rates)
        self.measured = Measured(blocks, prefix, open_stream)
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
        importance, similarity = self._importance()
        patterns, delta = self._patterns(this_round, importance)
        return Decided(patterns, importance, similarity, delta)

    def _importance(self) -> tuple[Tensor | None, Tensor | None]:
        """Importance of the blocks, None where all are pruned alike; and CKA, where it was needed."""
        count, name = len(self.measured.blocks), self._allocation.rates
        if count == 1:
            return None, None
        found = MEASURES[RATES[name].needs](self.measured)
        similarity = found if compares_samples(name) else None
        importance = self._function(found)
        if importance is None:
            return None, similarity
        if tuple(importance.shape) != (count,):
            shape = tuple(importance.shape)
            raise ValueError(f"allocation.rates {name!r}: expected importance ({count},), got {shape}")
        if isinstance(importance, DTensor):  # made of a sharded model's parameters
            importance = importance.full_tensor()
        return from_rank_zero(importance.double().cpu()), similarity

    def _patterns(self, this_round: Round, importance: Tensor | None) -> tuple[list[Pattern], float | None]:
        """Patterns of all blocks; and the half width of their box, where losses chose it."""
        row, config = RATES[self._allocation.rates], self._allocation
        fill, reached = config.fill or row.fill, [block.sparsity() for block in self.measured.blocks]

        def within(delta: float | None) -> list[Pattern]:
            return patterns_for(this_round, importance, reached, self._prune, delta, fill)

        if importance is None or not tries_widths(config.rates, config.delta):
            default = None if isinstance(row.delta, str) else row.delta
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
