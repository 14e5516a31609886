"""Where the blocks of an offloaded model go once they are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from losa.algorithm.block import WrappedBlock
from losa.algorithm.block_pruning import PrunedBlock
from losa.algorithm.block_rates import Decided


@dataclass(frozen=True)
class FinishedBlock:
    """``kept``: how many weights of each linear are kept, by name within the block; ``damping``: of the block's linears
    by full name, and ``expert_tokens``, as in ``losa.record.RoundRecord``."""

    kept: dict[str, int]
    damping: dict[str, float | None]
    expert_tokens: dict[str, list[int]]


class FinishedBlocks(Protocol):
    """Keeps blocks that are pruned for good, and the rates by which they are."""

    def rates(self, decide: Callable[[], Decided]) -> Decided:
        """What an earlier process has decided, else what is decided now, which is kept."""

    def find(self, index: int) -> FinishedBlock | None:
        """A block that an earlier process has finished, None where it is still to be pruned. A finished block comes
        into memory with the weights that it had at the end, and masks that keep everything."""

    def take(self, index: int, block: WrappedBlock, pruned: PrunedBlock) -> FinishedBlock:
        """Keep a block, which is in memory and leaves it then. Its weights may be changed."""
