"""A decoder waits between two texts: built once, freed with its model, and built anew when the model has changed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from losa.inference.decoding import LeanDecoder
from losa.inference.generation import generate
from losa.inference.sparsify import densify, sparsify
from losa.inference.waiting_decoders import _looks, _waiting
from tests.helpers.decoders import LLAMA_KIND, build, greedy, thin
from tests.helpers.other_models import likeliest, llama
from tests.helpers.tiny import tiny_tokenizer


def counted(monkeypatch):
    """A list that grows by one for each decoder that is built and checked."""
    built, check = [], LeanDecoder._check
    monkeypatch.setattr(LeanDecoder, "_check", lambda self, model: built.append(self) or check(self, model))
    return built


def test_a_waiting_decoder_sees_that_values_were_loaded(merged):
    model = sparsify(merged)
    generate(model, tiny_tokenizer(), "hello", max_new_tokens=2)
    (before, _), now = _waiting[model], _looks(model)
    assert before == now
    model.load_state_dict(model.state_dict())
    assert _looks(model) != before


def test_a_decoder_is_built_once_and_frees_its_cache(monkeypatch):
    model, tokenizer, built = build(*LLAMA_KIND["qwen2"]), tiny_tokenizer(), counted(monkeypatch)
    for prompt, count in (("hello", 8), ("hi there", 40), ("hello", 8)):
        found = generate(model, tokenizer, prompt, max_new_tokens=count, stop_at_eos=False)
        assert found.tokens == greedy(model, tokenizer, prompt, count)
        assert built[0].cache.numel() == 0
    # A text in the middle of another takes a decoder of its own.
    inner = []

    def interrupt(_):
        inner.append(generate(model, tokenizer, "hello", max_new_tokens=8, stop_at_eos=False).tokens)

    generate(model, tokenizer, "ab", max_new_tokens=3, stop_at_eos=False, on_text=interrupt)
    assert len(inner) == 3 and all(tokens == found.tokens for tokens in inner) and len(built) == 2


def test_a_waiting_decoder_does_not_keep_its_model():
    model = build(*LLAMA_KIND["llama"])
    generate(model, tiny_tokenizer(), "hello", max_new_tokens=2)
    leaves = weakref.ref(model)
    del model
    gc.collect()
    assert leaves() is None


# What is done to a model between two texts: (packed before, change, decoders that must be built anew)
CHANGES = {
    "weight": (False, lambda m: setattr(m.model.norm, "weight", nn.Parameter(1.5 * m.model.norm.weight)), 1),
    "data": (False, lambda m: setattr(m.model.layers[0].input_layernorm.weight, "data", torch.rand(32) + 0.5), 1),
    "in place": (False, lambda m: m.model.layers[1].mlp.up_proj.weight.mul_(1.5), 0),
    "module": (False, lambda m: m.model.layers[0].self_attn.set_submodule("v_proj", nn.Linear(32, 16)), 1),
    "dtype": (False, lambda m: m.double(), 1),
    "sparsify": (False, thin, 1),
    "densify": (True, densify, 1),
    "bias in place": (True, lambda m: m.model.layers[0].self_attn.k_proj.bias.add_(3), 0),
    "packed dtype": (True, lambda m: m.bfloat16().float(), 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_decoder_sees_changes(monkeypatch, name):
    packed, change, builds = CHANGES[name]
    model, tokenizer = build(*LLAMA_KIND["qwen2"]), tiny_tokenizer()
    if packed:
        thin(model)
    built = counted(monkeypatch)
    generate(model, tokenizer, "hello", max_new_tokens=4, stop_at_eos=False)
    change(model)
    found = generate(model, tokenizer, "hello", max_new_tokens=20, stop_at_eos=False)
    assert found.tokens == greedy(model, tokenizer, "hello", 20) and len(built) == 1 + builds


def test_hooked_models_are_checked_every_time(monkeypatch):
    model, tokenizer, built = build(*LLAMA_KIND["llama"]), tiny_tokenizer(), counted(monkeypatch)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    for _ in range(2):
        generate(model, tokenizer, "hello", max_new_tokens=3)
    assert len(built) == 2


def test_a_waiting_decoder_sees_a_modules_numbers():
    model = llama()
    generate(model, tiny_tokenizer(), "hello", max_new_tokens=2)
    model.model.layers[0].self_attn.scaling *= 4
    model.model.norm.variance_epsilon = 0.5
    found = generate(model, tiny_tokenizer(), "hello", max_new_tokens=8, stop_at_eos=False)
    assert found.fallback is None and found.tokens == likeliest(model, tiny_tokenizer()("hello").input_ids, 8)
