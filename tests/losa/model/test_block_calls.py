"""What blocks are called with and what they return, whatever their form."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from transformers.utils import ModelOutput

from losa.errors import ModelError
from losa.model.block_calls import hidden_of, same


@pytest.mark.parametrize("wrap", [list, tuple, lambda x: ModelOutput(last_hidden_state=x[0]), lambda x: {"h": x[0]}])
def test_hidden_states_in_any_container(wrap):
    hidden = torch.randn(1, 2, 3)
    assert hidden_of(wrap([hidden])) is hidden and hidden_of(hidden) is hidden
    for other in ([], {}, None, [None]):
        with pytest.raises(ModelError, match="expected it to return hidden states"):
            hidden_of(other)


class Cache:
    def __init__(self, *tensors):
        self.layers = list(tensors)
        self.me = self


class Keys(UserDict):
    pass


class Slots:
    __slots__ = ("x",)


def test_arguments_are_the_same_only_if_all_of_them_is():
    one, two = torch.ones(2), torch.zeros(2)
    alike = [
        (one, one.clone()),
        ([one, None, "a"], [one.clone(), None, "a"]),
        ({"a": (1, 2.5)}, {"a": (1, 2.5)}),
        (Cache(one), Cache(one.clone())),
        (Keys(a=one), Keys(a=one.clone())),
        (slice(1, 2), slice(1, 2)),
        (torch.float32, torch.float32),
    ]
    different = [
        (one, two),
        (one, one.half()),
        (1, 2),
        ("a", "b"),
        (None, one),
        (Cache(one), Cache(two)),
        (Cache(one), Cache()),
        (Keys(a=one), Keys(a=two)),
        (Keys(a=one), {"a": one}),
        (Slots(), Slots()),
        (lambda: one, lambda: two),
        ({"a": one}, {"b": one}),
    ]
    assert all(same(a, b) and same(b, a) for a, b in alike)
    assert not any(same(a, b) or same(b, a) for a, b in different)
