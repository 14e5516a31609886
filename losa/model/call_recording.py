"""What the blocks of a model are called with for given tokens, without computing any block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from losa.errors import ModelError
from losa.model.block_calls import Call, split_call, stores_in, with_stores


class _Recorder(nn.Module):
    """Stands in a list of blocks for one of them: it notes what it is called with and returns the hidden states that it
    gets, in the form in which the block returns them. Whatever else is asked of it, the block answers."""

    def __init__(self, block: nn.Module, returned: Any):
        super().__init__()
        vars(self)["block"], vars(self)["returned"] = block, returned
        self.call: Call | None = None

    def forward(self, *args, **kwargs):
        hidden, self.call = split_call(args, kwargs)
        return with_hidden(self.returned, hidden)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["block"], name)


@contextmanager
def recording(blocks: nn.ModuleList, returned: Sequence[Any]) -> Iterator[list[Call]]:
    """Within the context a forward pass of the model runs no block. It gives a list that has what each block was called
    with when the context ends.

    Args:
        blocks: of the model.
        returned: what each block returns; only its form counts.
    """
    recorders = [_Recorder(block, form) for block, form in zip(blocks, returned, strict=True)]
    real = dict(blocks._modules)
    calls: list[Call] = []
    try:
        for key, recorder in zip(real, recorders, strict=True):
            blocks._modules[key] = recorder
        yield calls
    finally:
        blocks._modules.update(real)
    calls += [recorder.call for recorder in recorders if recorder.call is not None]


def recorded(
    blocks: nn.ModuleList, names: Sequence[str], returned: Sequence[Any], run: Callable[[], None]
) -> list[Call]:
    """What every block is called with in ``run``, a forward pass of the model (``recording``). Raises ModelError: a
    block is not called."""
    with recording(blocks, returned) as calls:
        run()
    if len(calls) != len(names):
        raise ModelError(f"{names[len(calls)]}: is called in some passes only")
    return calls


class CallsOfTokens:
    """What the blocks are called with for certain tokens, by the block's index. It is recorded whenever somebody asks,
    so that no tensors are kept. What blocks may write in, for later ones to read, is kept and stays the same.

    Args:
        record: gives the calls of all blocks (``recording``).
    """

    def __init__(self, record: Callable[[], Sequence[Call]]):
        self._record = record
        self._stores = [stores_in(call.args, call.kwargs) for call in record()]

    def __getitem__(self, index: int) -> Call:
        call = self._record()[index]
        args, kwargs = with_stores(call.args, call.kwargs, self._stores[index])
        return replace(call, args=args, kwargs=kwargs)


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A block's output with other hidden states (``losa.model.block_calls.hidden_of``)."""
    if isinstance(output, Mapping):
        other: Any = copy.copy(output)
        other[next(iter(output))] = hidden
        return other
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: hidden})
    if isinstance(output, (tuple, list)):
        return (hidden, *output[1:]) if isinstance(output, tuple) else [hidden, *output[1:]]
    return hidden
