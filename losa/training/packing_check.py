"""A question that transformers asks in every forward pass, and that makes the host wait for its GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import masking_utils


@contextmanager
def packing_checked_once() -> Iterator[None]:
    """Within the context transformers looks once for each shape, and not in each forward pass, whether position ids
    start anew within a row, as of several texts in one.

    Without an attention mask and a cache, as in training, models number the positions themselves: the answer depends on
    the shape alone.
    """
    look = getattr(masking_utils, "find_packed_sequence_indices", None)
    if look is None:
        yield
        return
    answers: dict[tuple, Tensor | None] = {}

    def once(position_ids: Tensor) -> Tensor | None:
        key = (tuple(position_ids.shape), position_ids.device)
        if key not in answers:
            answers[key] = look(position_ids)
        return answers[key]

    masking_utils.find_packed_sequence_indices = once
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look
