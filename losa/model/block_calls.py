"""What a decoder block is called with and what it returns, in each form that models use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import ModelError


@dataclass(frozen=True)
class Call:
    """All arguments of a block but its hidden states. ``hidden_keyword``: the name of the hidden states' argument; None
    where the hidden states are the first argument. ``returned``: the form of what the block returned, with an empty
    tensor for the hidden states."""

    args: tuple
    kwargs: dict
    hidden_keyword: str | None
    returned: Any = None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.hidden_keyword is None:
            return hidden_of(block(hidden, *self.args, **self.kwargs))
        return hidden_of(block(*self.args, **{self.hidden_keyword: hidden}, **self.kwargs))


Stores = dict[int | str, Any]  # by place among the arguments, or keyword


def stores_in(args: tuple, kwargs: Mapping[str, Any]) -> Stores:
    """The arguments of a block that it may write in, for later blocks to read: shared keys and values."""
    found: Stores = {place: value for place, value in enumerate(args) if _is_store(value)}
    return found | {name: value for name, value in kwargs.items() if _is_store(value)}


def with_stores(args: tuple, kwargs: Mapping[str, Any], stores: Stores) -> tuple[tuple, dict[str, Any]]:
    """The arguments with those of ``stores`` in their places."""
    other = tuple(stores.get(place, value) for place, value in enumerate(args))
    return other, {name: stores.get(name, value) for name, value in kwargs.items()}


def _is_store(value: Any) -> bool:
    return hasattr(value, "__setitem__") and not isinstance(value, (Tensor, list))


def hidden_of(output) -> Tensor:
    """The hidden states in a block's output, which is a tensor, or a sequence or mapping whose first entry is one."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, (tuple, list)):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise ModelError(
            f"decoder block: expected it to return hidden states, first of all; got {type(first).__name__}"
        )
    return first


def split_call(args: tuple, kwargs: dict) -> tuple[Tensor, Call]:
    """The hidden states that a block is called with, and its other arguments. Raises ModelError."""
    if args:
        hidden, call = args[0], Call(tuple(args[1:]), dict(kwargs), None)
    elif "hidden_states" in kwargs:
        rest = dict(kwargs)
        hidden, call = rest.pop("hidden_states"), Call((), rest, "hidden_states")
    else:
        raise ModelError(f"decoder block: expected hidden states as first argument, got keywords {sorted(kwargs)}")
    if not isinstance(hidden, Tensor):
        raise ModelError(f"decoder block: expected hidden states as first argument, got {type(hidden).__name__}")
    return hidden, call


def same(a, b, inside: tuple[int, ...] = ()) -> bool:
    """Whether a block would read the same from two arguments. Objects are compared by their attributes; objects without
    readable attributes are the same only if they are one object."""
    if a is b or id(a) in inside:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    inside = (*inside, id(a))
    if isinstance(a, Mapping):
        if a.keys() != b.keys() or not all(same(a[key], b[key], inside) for key in a):
            return False
    elif isinstance(a, (tuple, list)):
        if len(a) != len(b) or not all(same(x, y, inside) for x, y in zip(a, b, strict=True)):
            return False
    elif callable(a) or not hasattr(a, "__dict__"):
        try:
            return bool(a == b)
        except (TypeError, ValueError, RuntimeError):
            return False
    return same(getattr(a, "__dict__", None), getattr(b, "__dict__", None), inside)
