"""What can be taken from a decoder block as a whole: attention heads and MLP channels, counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a block of Llama's kind, by the last part of their names."""


@dataclass(frozen=True)
class Counts:
    """What a block has of each part: ``groups`` of query heads that share a key head and a value head, ``per_group``
    query heads in each group, and ``channels`` of the MLP."""

    groups: int
    per_group: int
    channels: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.per_group


@dataclass(frozen=True)
class Structure:
    """The blocks of a model, which are all alike.

    ``hidden``: features of the hidden states; ``head_dim``: of a head; ``full``: what a block has before pruning;
    ``linears``: names within the block by role (``ROLES``); ``choices``: the pairs (groups, query heads per group) that
    a configuration of the model's class accepts, ``full``'s among them.
    """

    hidden: int
    head_dim: int
    full: Counts
    linears: Mapping[str, str]
    choices: tuple[tuple[int, int], ...]

    def weights(self, counts: Counts) -> int:
        """Weights of a block's linears that has ``counts``."""
        attention = 2 * self.head_dim * (counts.heads + counts.groups)
        return self.hidden * (attention + 3 * counts.channels)

    def nearest(self, sparsity: float, at_most: Counts) -> Counts:
        """Counts up to ``at_most`` whose share of removed weights is as near as possible to ``sparsity``.

        Heads are coarse and channels are fine: attention gives up a share as near to ``sparsity`` as whole heads
        allow, and channels make up the difference. Of equally near choices the one with more query heads is taken.
        """
        return min(self._candidates(sparsity, at_most), key=lambda found: found[0])[1]

    def _candidates(self, sparsity: float, at_most: Counts) -> Iterator[tuple[tuple, Counts]]:
        wanted = (1 - sparsity) * self.weights(self.full)
        channel = 3 * self.hidden
        for groups, per_group in self.choices:
            if groups > at_most.groups or per_group > at_most.per_group:
                continue
            attention = self.weights(Counts(groups, per_group, 0))
            channels = min(max(round((wanted - attention) / channel), 1), at_most.channels)
            counts = Counts(groups, per_group, channels)
            # Half a channel is what rounding may miss; only a choice that channels cannot make up for misses more.
            missed = max(abs(self.weights(counts) - wanted) - channel / 2, 0)
            kept = (counts.heads + groups) / (self.full.heads + self.full.groups)
            yield (round(missed), abs(1 - kept - sparsity), -counts.heads), counts
