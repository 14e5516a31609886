"""Perplexity against an independent fp64 computation."""

from __future__ import annotations

import logging
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from losa.distributed.stop import Stopped, heeding_signals
from losa.errors import DataError, NumericsError
from losa.evaluation import perplexity as perplexity_module
from losa.evaluation.perplexity import evaluation_windows, perplexity, warn_of_missing_start
from losa.training import loss as loss_module
from tests.helpers.causal_models import MODELS, VOCABULARY
from tests.helpers.tiny import tiny_llama

TOKENS = torch.randint(0, VOCABULARY, (203,), generator=torch.Generator().manual_seed(0))


def reference(model, tokens, length, windows):
    """Mean NLL in fp64, one window and one position at a time."""
    total, count = 0.0, 0
    model = model.double()
    for w in range(windows):
        window = tokens[w * length : (w + 1) * length]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for t in range(length - 1):
            total -= torch.log_softmax(logits[t], -1)[window[t + 1]].item()
            count += 1
    return total / count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size, max_windows", [(1, None), (3, None), (2, 3)])
def test_perplexity_is_the_papers(name, batch_size, max_windows, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 5 * VOCABULARY * 4)
    model = MODELS[name]().train()
    result = perplexity(model, TOKENS, 20, batch_size, max_windows)
    windows = max_windows or 10
    assert (result.windows, result.tokens, result.length) == (windows, windows * 20, 20)
    assert model.training
    expected = reference(model.eval(), TOKENS, 20, windows)
    # fp32 against fp64: sums of at most 98 terms per logit and per normaliser, through two layers.
    assert result.nll == pytest.approx(expected, rel=200 * torch.finfo(torch.float32).eps)
    assert result.value == pytest.approx(math.exp(result.nll), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_names_the_window(value):
    model = tiny_llama(layers=1)
    model.model.embed_tokens.weight.data[96] = value
    tokens = torch.arange(60) % 50
    tokens[45] = 96
    with pytest.raises(NumericsError, match="windows 4..5 of 6"):
        perplexity(model, tokens, 10, batch_size=2)
    with pytest.raises(NumericsError, match="window 4 of 6"):
        perplexity(model, tokens, 10)
    assert not model.training
    assert perplexity(model, tokens, 10, max_windows=4).windows == 4


def test_a_signal_stops_it_between_batches(monkeypatch):
    batches = []

    def summed(*arguments):
        batches.append(arguments)
        os.kill(os.getpid(), signal.SIGUSR1)
        return 1.0

    monkeypatch.setattr(perplexity_module, "_summed", summed)
    with heeding_signals(), pytest.raises(Stopped, match="SIGUSR1"):
        perplexity(tiny_llama(layers=1), torch.arange(200) % 90, 10)
    assert len(batches) == perplexity_module._BETWEEN_CHECKS < 20


def test_bad_arguments():
    model = tiny_llama(layers=1)
    with pytest.raises(DataError, match="9 tokens are less than one window of evaluate.length, 10"):
        perplexity(model, torch.arange(9), 10)
    for arguments in ({"length": 1}, {"length": 4, "batch_size": 0}, {"length": 4, "max_windows": 0}):
        with pytest.raises(ValueError, match="expected at least"):
            perplexity(model, torch.arange(9), **arguments)


def test_windows_beyond_the_models_positions_are_pointed_out(caplog):
    with caplog.at_level(logging.WARNING, "losa"):
        perplexity(tiny_llama(layers=1), torch.arange(300) % 90, 300)
    assert "256 positions" in caplog.text


@pytest.mark.parametrize("lead", [[], [1]])
def test_windows_may_begin_with_a_token_of_their_own(lead):
    """The text's tokens are predicted all, the first of a window from that token alone; one in front is not doubled."""
    model = tiny_llama(layers=2)
    tokens = torch.cat([torch.tensor(lead, dtype=torch.int64), TOKENS])
    found = perplexity(model, tokens, 20, 3, bos=1)
    assert (found.windows, found.tokens, found.length) == (10, 190, 20)
    begun = torch.cat([torch.ones(10, 1, dtype=torch.int64), TOKENS[:190].reshape(10, 19)], 1)
    assert torch.equal(evaluation_windows(tokens, 20, bos=1), begun)
    expected = reference(model, begun.flatten(), 20, 10)
    assert found.nll == pytest.approx(expected, rel=200 * torch.finfo(torch.float32).eps)
    with pytest.raises(DataError, match="9 tokens are less than one window"):
        perplexity(model, torch.arange(9) + 2, 11, bos=1)
    assert perplexity(model, torch.arange(9) + 2, 10, bos=1).windows == 1


class Sink(torch.nn.Module):
    """Knows the next token where it sees token 1 in front, and nothing without it; or does not care."""

    def __init__(self, cares):
        super().__init__()
        self.cares = cares
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_output_embeddings(self):
        return None

    def forward(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        if not self.cares or ids[0, 0] == 1:
            logits[..., :-1, :].scatter_(-1, ids[:, 1:, None], 20.0)
        return SimpleNamespace(logits=logits)


def test_models_that_need_the_first_token_are_pointed_out(caplog):
    tokenizer = SimpleNamespace(bos_token_id=1)
    text = torch.cat([torch.tensor([1]), TOKENS.clamp(min=2)])
    with caplog.at_level(logging.WARNING, "losa"):
        warn_of_missing_start(Sink(False), tokenizer, text, 20)
        warn_of_missing_start(Sink(True), tokenizer, text[1:], 20)
        warn_of_missing_start(Sink(True), tokenizer, text[:30], 20)
        warn_of_missing_start(Sink(True), SimpleNamespace(bos_token_id=None), text, 20)
        assert not caplog.records
        warn_of_missing_start(Sink(True), tokenizer, text, 20)
    assert f"perplexity is 1 with it and {VOCABULARY} without. --bos" in caplog.text
