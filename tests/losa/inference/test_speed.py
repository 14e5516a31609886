"""Decode speeds of models that only transformers computes."""

from __future__ import annotations

import pytest
import torch

from losa.errors import ModelError
from losa.inference.speed import decode_speeds
from tests.helpers.logs import said
from tests.helpers.other_models import halved, other


def test_bench_says_what_it_leaves_out(caplog, monkeypatch):
    model = halved(other("windows"))
    forward = type(model).forward

    def failing(self, *args, **settings):
        if self.dtype == torch.bfloat16:
            raise TypeError("no bfloat16 here")
        return forward(self, *args, **settings)

    monkeypatch.setattr(type(model), "forward", failing)
    found = decode_speeds(model, tokens=3, repetitions=1)
    assert [speed.name for speed in found] == ["transformers, dense", "transformers, packed"]
    messages = said(caplog)
    assert messages[0].startswith("bench: through transformers only: attention in a sliding window of 4 tokens")
    assert messages[1].startswith(
        "transformers, packed bfloat16, not measured: bench: MistralForCausalLM fails in transf"
    )
    monkeypatch.setattr(type(model), "forward", lambda self, **_: 1 / 0)
    with pytest.raises(ModelError, match="bench: the model generates neither"):
        decode_speeds(model, tokens=3, repetitions=1)
