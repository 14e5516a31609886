"""The one-token step of static shapes against the plain loop and transformers; its recordings, on fakes of CUDA's."""

from __future__ import annotations

import logging

import pytest
import torch

from losa.errors import LosaError
from losa.inference import decoding, token_graphs
from losa.inference.decoder_blocks import joined
from losa.inference.decoding import LeanDecoder
from losa.inference.generation import generate
from losa.inference.token_graphs import TokenGraphs
from losa.model.blocks import find_blocks
from losa.model.grouping import join_linears
from losa_kernels.packing import PackedBitmask
from tests.helpers.decoders import LLAMA_KIND, build, greedy, thin
from tests.helpers.tiny import EPS, tiny_tokenizer


class Recorder:
    """Recordings that call the function again; ``made`` of them, ``replays`` in all."""

    def __init__(self):
        self.made, self.replays, self.closed = 0, 0, 0

    def __call__(self, function):
        self.made += 1

        def replay():
            self.replays += 1
            function()

        return replay

    def close(self):
        self.closed += 1


@pytest.fixture
def recorders(monkeypatch):
    """Decoders read single tokens by the step on any device; the recorders they made."""
    made = []

    def graphs_for(device):
        made.append(Recorder())
        return TokenGraphs(made[-1], device)

    monkeypatch.setattr(decoding, "graphs_for", graphs_for)
    monkeypatch.setattr(token_graphs, "BUCKET", 16)
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_steps_give_the_loops_logits(recorders, name, packed):
    model = build(*LLAMA_KIND[name])
    if packed:
        thin(model)
    ids = torch.randint(2, 90, (40,))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    decoder = LeanDecoder(model, 40)
    assert decoder.cache.shape[-2] == len(decoder.cos) == 40
    found = [decoder(ids[:3]).clone(), *(decoder(token[None]).clone() for token in ids[3:])]
    for logits, truth in zip(found, expected[2:], strict=True):
        assert (logits - truth).abs().max() <= 64 * EPS * truth.abs().max()
    # 16 places were recorded at their second token, the fifth of all, then 32 and 64.
    assert recorders[-1].made == 3 and recorders[-1].replays == 37 - 3
    with pytest.raises(LosaError, match="41 tokens are more than max_length, 40"):
        decoder(ids[:1])


@pytest.mark.parametrize("name", LLAMA_KIND)
def test_steps_give_transformers_tokens(recorders, name):
    model, tokenizer = build(*LLAMA_KIND[name]), tiny_tokenizer()
    found = generate(model, tokenizer, "hello there", max_new_tokens=100, stop_at_eos=False)
    assert found.tokens == greedy(model, tokenizer, "hello there", 100)
    assert sum(recorder.replays for recorder in recorders) > 80
    assert recorders[-1].closed == 1 and all(recorder.closed for recorder in recorders)


def test_drawn_tokens_do_not_depend_on_the_way(recorders, monkeypatch):
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer()

    def drawn():
        return generate(model, tokenizer, "hi", max_new_tokens=30, temperature=0.7, top_p=0.9, stop_at_eos=False).tokens

    found = drawn()
    assert sum(recorder.replays for recorder in recorders) > 20
    monkeypatch.setattr(decoding, "graphs_for", lambda device: None)
    assert found == drawn()


def test_texts_of_other_lengths_and_their_ends(recorders):
    """One model's texts one after another: every cache has room, and each text stops where it should."""
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer()
    longest = greedy(model, tokenizer, "abc", 60)
    for count in (20, 1, 60, 2):
        found = generate(model, tokenizer, "abc", max_new_tokens=count, stop_at_eos=False)
        assert found.tokens == longest[:count]
    end = longest[37]
    model.generation_config.eos_token_id = [end]
    assert generate(model, tokenizer, "abc", max_new_tokens=60).tokens == longest[: longest.index(end) + 1]


def test_texts_in_pieces(recorders):
    """Single tokens between longer pieces, a reset, and junk that an earlier text left in the cache."""
    decoder = LeanDecoder(build(*LLAMA_KIND["qwen3"]), 24)
    ids = torch.randint(2, 90, (20,))
    decoder.cache.fill_(float("nan"))
    decoder.reset()
    whole = decoder(ids)
    decoder.reset()
    for part in ids.split([5, 1, 1, 4, 1, 7, 1]):
        pieces = decoder(part)
    assert (whole - pieces).abs().max() <= 64 * EPS * whole.abs().max()


def test_likeliest_follows_itself(recorders):
    decoder = LeanDecoder(build(*LLAMA_KIND["llama"]), 40)
    decoder(torch.arange(3, 8))
    tokens = [torch.tensor([9])]
    for _ in range(30):
        tokens.append(decoder.likeliest(tokens[-1]).clone())
    decoder.reset()
    decoder(torch.arange(3, 8))
    token, again = torch.tensor([9]), [9]
    for _ in range(30):
        token = decoder.likeliest(token)
        again.append(int(token))
    assert again == [int(token) for token in tokens] and len(set(again)) > 3


def test_a_recording_that_fails_is_said_once(recorders, monkeypatch, caplog):
    model = build(*LLAMA_KIND["llama"])
    ids = torch.randint(2, 90, (9,))
    expected = LeanDecoder(model, 12)(ids)
    monkeypatch.setattr(Recorder, "__call__", lambda self, function: 1 / 0)
    decoder = LeanDecoder(model, 12)
    with caplog.at_level(logging.WARNING, logger="losa"):
        for token in ids:
            logits = decoder(token[None])
    assert (logits - expected).abs().max() <= 64 * EPS * expected.abs().max() and decoder.length == 9
    assert [record.message for record in caplog.records] == [
        "generate: no CUDA graph, tokens are read step by step: division by zero"
    ]


def test_what_a_replay_would_leave_out_is_not_recorded(recorders, monkeypatch):
    """Hooks, and the host's share in unpacking without native code."""
    model, tokenizer = build(*LLAMA_KIND["llama"]), tiny_tokenizer()
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    del seen[:]
    generate(model, tokenizer, "hello", max_new_tokens=12, stop_at_eos=False)
    assert len(seen) >= 12 and not recorders
    hook.remove()
    monkeypatch.setenv("LOSA_BACKEND", "Reference")
    generate(model, tokenizer, "hello", max_new_tokens=12, stop_at_eos=False)
    assert recorders[-1].replays
    del recorders[:]
    generate(thin(model), tokenizer, "hello", max_new_tokens=12, stop_at_eos=False)
    assert not recorders


class OfOutside(PackedBitmask):
    """A class that no kernel multiplies; its own code may wait for the device."""


def test_packed_weights_without_kernels_are_not_recorded(recorders):
    model = thin(build(*LLAMA_KIND["llama"]))
    down = model.model.layers[0].mlp.down_proj
    down.set_packed(OfOutside(**down.packed.__getstate__()))
    assert generate(model, tiny_tokenizer(), "hello", max_new_tokens=12, stop_at_eos=False).fallback is None
    assert not recorders


def test_a_decoder_made_in_inference_mode_works_outside(recorders):
    with torch.inference_mode():
        decoder = LeanDecoder(build(*LLAMA_KIND["llama"]), 12)
    ids = torch.randint(2, 90, (9,))
    whole = decoder(ids)
    decoder.reset()
    for token in ids:
        last = decoder(token[None])
    assert (whole - last).abs().max() <= 64 * EPS * whole.abs().max()


def test_only_gpus_have_graphs(monkeypatch):
    assert token_graphs.graphs_for(torch.device("cpu")) is None
    monkeypatch.setenv("LOSA_DECODE_GRAPH", "0")
    assert token_graphs.graphs_for(torch.device("cuda")) is None


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_joined_linears(name):
    model = build(*LLAMA_KIND[name])
    ids = torch.arange(3, 20)
    expected = LeanDecoder(model, 20)(ids)
    for block in find_blocks(model):
        before, attention = block.mlp.up_proj.weight.clone(), block.self_attn
        join_linears(block)
        assert torch.equal(block.mlp.up_proj.weight, before)
        assert joined([linear.weight for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]) is not None
        assert joined([block.mlp.up_proj.weight, block.mlp.gate_proj.weight]) is None
    found = LeanDecoder(model, 20)(ids)
    assert (found - expected).abs().max() <= 64 * EPS * expected.abs().max()
    assert thin(model).model.layers[0].mlp.gate_proj.group is not None
