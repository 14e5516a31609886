"""A question that transformers asks in every forward pass, and that makes the host wait for its GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor
from transformers import masking_utils

_NAME = "find_packed_sequence_indices"

# Shape and device of position ids.
Shape = tuple[tuple[int, ...], torch.device]


class _Once:
    """transformers' ``find_packed_sequence_indices``, which does not look again at a shape that is known. It answers
    so in the thread that made it, and not while torch.compile traces."""

    def __init__(self, look: Callable[[Tensor], Tensor | None], known: set[Shape]):
        self.look = look
        self._known = known
        self._thread = get_ident()

    def __call__(self, position_ids: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling() or get_ident() != self._thread:
            return self.look(position_ids)
        shape = (tuple(position_ids.shape), position_ids.device)
        if shape in self._known:
            return None
        found = self.look(position_ids)
        if found is None:
            self._known.add(shape)
        return found


@contextmanager
def packing_checked_once(known: set[Shape]) -> Iterator[None]:
    """Within the context transformers looks once for each shape, and not in each forward pass, whether position ids
    start anew within a row, as of several texts in one.

    Only for forward passes in which the model numbers the positions itself: without position ids, an attention mask and
    a cache. The answer then depends on the shape alone. To give position ids would not save the look:
    transformers looks at these too.

    Args:
        known: shapes that do not start anew; the context adds to them.
    """
    before = getattr(masking_utils, _NAME, None)
    if before is None:
        yield
        return
    # Contexts of several threads may end in any order: what they put back is always transformers' own function.
    look = before.look if isinstance(before, _Once) else before
    setattr(masking_utils, _NAME, _Once(look, known))
    try:
        yield
    finally:
        setattr(masking_utils, _NAME, look)
