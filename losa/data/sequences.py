"""Packed training sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# The label of positions without a loss.
IGNORED = -100


@dataclass(frozen=True)
class PackedData:
    """Sequences of one length: ``input_ids`` and ``labels``, both (n, length) int64.

    Labels are aligned with the inputs, since Hugging Face models shift them: position t learns to predict label t + 1.
    A label is -100 where nothing is learnt. The first label of each sequence is -100, since no position predicts it.
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def slice(self, start: int, stop: int) -> PackedData:
        """Sequences start..stop - 1 (views, not copies)."""
        return PackedData(self.input_ids[start:stop], self.labels[start:stop])
