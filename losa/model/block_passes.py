"""Forward passes of a whole model over many batches at once, one decoder block after the other: each block is in memory
once. What is outside of the blocks runs anew for every block and batch, so that nothing that a block is called with has
to be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losa.distributed.sharding import device_of, gathered
from losa.distributed.stop import check
from losa.distributed.watch import progress
from losa.model.block_calls import Stores, hidden_of, stores_in, with_stores
from losa.model.blocks import Blocks
from losa.model.call_recording import recording, with_hidden


class _Ended(Exception):
    """Ends a forward pass once the block whose turn it is has run."""


class BlockPasses:
    """The hidden states behind all decoder blocks, for batches of token ids.

    Args:
        model: a causal LM in evaluation mode.
        blocks: its decoder blocks, which may be offloaded.
        batches: (batch, length) int64 each.

    Raises:
        Stopped: between batches, if a signal asks for it.
        ModelError: a block returns no hidden states.
    """

    @torch.no_grad()
    def __init__(self, model: Any, blocks: Blocks, batches: Sequence[Tensor]):
        self._model, self._blocks = model, blocks
        self.device = device_of(blocks.modules)
        self._hidden: list[Tensor] = [torch.empty(0)] * len(batches)
        self._written: list[Stores] = [{} for _ in batches]
        # Of each block that has run, what it returned for the first batch, without hidden states. Only these are
        # right for other batches: a model that reads more of what a block returns is none that losa prunes.
        self._outputs: list[Any] = []
        for index, (name, block) in enumerate(zip(blocks.names, blocks, strict=True)):
            with gathered(block):
                for number, batch in enumerate(batches):
                    progress(f"running {name}, batch {number + 1} of {len(batches)}")
                    check()
                    self._advance(index, number, batch)

    def _advance(self, index: int, number: int, batch: Tensor) -> None:
        block: Any = self._blocks.modules[index]
        compute = block.forward

        def run(*args, **kwargs):
            # What blocks write for later ones, as shared keys and values, is the batch's in all passes.
            stores = stores_in(args, kwargs)
            kept = {key: self._written[number].setdefault(key, value) for key, value in stores.items()}
            args, kwargs = with_stores(args, kwargs, kept)
            output = compute(*args, **kwargs)
            # A GPU holds the hidden states of one batch.
            self._hidden[number] = hidden_of(output).to("cpu")
            if len(self._outputs) == index:
                self._outputs.append(with_hidden(output, torch.empty(0)))
            raise _Ended

        with self._played(index, self._hidden[number].to(self.device)), _replaced({block: run}), suppress(_Ended):
            self._model(batch.to(self.device), use_cache=False)

    @contextmanager
    def ended(self, number: int) -> Iterator[None]:
        """Within the context a pass of the model over a batch, by its number, runs no block: the last one returns what
        was computed."""
        with self._played(len(self._blocks), self._hidden[number].to(self.device)):
            yield

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Within the context every block returns what it gets, for a pass of the model over any tokens."""
        with recording(self._blocks.modules, self._outputs):
            yield

    @contextmanager
    def _played(self, count: int, hidden: Tensor) -> Iterator[None]:
        """The first ``count`` blocks return ``hidden``."""

        def play(index, *args, **kwargs):
            return with_hidden(self._outputs[index], hidden)

        with _replaced({self._blocks.modules[index]: partial(play, index) for index in range(count)}):
            yield


@contextmanager
def _replaced(forwards: Mapping[Any, Callable]) -> Iterator[None]:
    """Within the context blocks compute something else."""
    before = {block: vars(block).get("forward") for block in forwards}
    for block, forward in forwards.items():
        block.forward = forward
    try:
        yield
    finally:
        for block, forward in before.items():
            if forward is None:  # its class's own
                del block.forward
            else:
                block.forward = forward
