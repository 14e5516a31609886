"""The lean loop gives transformers' tokens, or says that it does not compute a model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from losa.errors import LosaError
from losa.inference.decoder_blocks import CalledMLP, product, read_block
from losa.inference.decoding import LeanDecoder, Unsupported
from losa.inference.generation import generate
from losa.inference.sparsify import densify
from losa.modules.linear_experts import LinearExperts
from losa.packed.directory import load, pack_directory
from losa_kernels import dispatch
from tests.helpers.decoders import LLAMA_KIND, build, greedy, thin
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.other_models import llama
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

OTHERS = {
    "mistral with a window": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": 4}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 64}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LLAMA_KIND)
def test_lean_loop_gives_transformers_tokens(name, packed):
    model, tokenizer = build(*LLAMA_KIND[name]), tiny_tokenizer()
    count = 200
    if packed:
        thin(model)
    expected = greedy(densify(copy.deepcopy(model)), tokenizer, "hello there", count)
    LeanDecoder(model, 41)
    pieces = []
    found = generate(model, tokenizer, "hello there", max_new_tokens=count, stop_at_eos=False, on_text=pieces.append)
    assert found.tokens == expected and found.prompt_tokens == 11
    assert "".join(pieces) == found.text and found.tokens_per_second > 0


MIXTURES = ["Mixtral", "Qwen3Moe"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_called_as_a_whole(name, packed, tmp_path):
    """Packed, a token calls the linears of the experts that it chose, and no others; nothing is recorded as a graph."""
    model, tokenizer = of_kind(KINDS[name]).eval().requires_grad_(False), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    expected = greedy(model, tokenizer, "hello there", 60)
    if packed:
        model.save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        pack_directory(tmp_path / "dense", tmp_path / "packed", min_sparsity=0.0)
        model, tokenizer = load(tmp_path / "packed")
    decoder = LeanDecoder(model, 80)
    assert decoder.graphs is None and all(isinstance(block.mlp, CalledMLP) for block in decoder.blocks)
    found = generate(model, tokenizer, "hello there", max_new_tokens=60, stop_at_eos=False)
    assert found.tokens == expected and found.fallback is None
    if packed:
        calls = []
        for experts in (m for m in model.modules() if isinstance(m, LinearExperts)):
            for expert in experts:
                expert.down_proj.register_forward_hook(lambda *_: calls.append(1))
        decoder(torch.tensor([5]))
        chosen = model.config.num_experts_per_tok
        assert len(calls) == chosen * len(decoder.blocks)


def test_a_plain_mlp_is_called_as_a_whole():
    """Of a kind that has no gate, whose logits are compared as any model's are."""
    model = build(*LLAMA_KIND["llama"])
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 32))
    model.requires_grad_(False)
    tokenizer = tiny_tokenizer()
    found = generate(model, tokenizer, "hello", max_new_tokens=20, stop_at_eos=False)
    assert found.fallback is None and found.tokens == greedy(model, tokenizer, "hello", 20)


def test_weights_that_nothing_reads_are_found_beside_an_mlp_that_is_called():
    model = build(*LLAMA_KIND["llama"])
    layers = model.model.layers
    layers[1].mlp = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 32))
    layers[0].mlp.extra = torch.nn.Parameter(torch.ones(1))
    model.requires_grad_(False)
    with pytest.raises(Unsupported, match="does not read model.layers.0.mlp.extra"):
        LeanDecoder(model, 32)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_go_through_transformers(name):
    model, tokenizer = build(*OTHERS[name]), tiny_tokenizer()
    with pytest.raises(Unsupported, match="generate: "):
        LeanDecoder(model, 32)
    found = generate(model, tokenizer, "hello", max_new_tokens=8, stop_at_eos=False)
    assert found.tokens == greedy(model, tokenizer, "hello", 8)


def test_a_model_that_computes_something_else_is_found_out():
    model = build(*LLAMA_KIND["llama"])
    inner = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 1.01 * inner(x)
    with pytest.raises(Unsupported, match="computes something else"):
        LeanDecoder(model, 32)


def test_reading_in_pieces_and_the_caches_end():
    decoder = LeanDecoder(build(*LLAMA_KIND["llama"]), 12)
    ids = torch.randint(2, 90, (12,))
    whole = decoder(ids)
    decoder.reset()
    for part in ids.split([5, 1, 4, 2]):
        pieces = decoder(part)
    assert (whole - pieces).abs().max() <= 64 * torch.finfo(torch.float32).eps * whole.abs().max()
    with pytest.raises(LosaError, match="13 tokens are more than max_length, 12"):
        decoder(ids[:1])


def test_a_lean_decoders_last_logits():
    decoder = LeanDecoder(llama(), 12)
    ids = torch.arange(3, 9)
    assert decoder(ids) is decoder.logits
    token = decoder.likeliest(ids[:1])
    assert decoder.logits.argmax() == token


def test_plain_linears_are_multiplied_by_dense_linear(monkeypatch):
    """In bf16 every one of a dense model, the output layer among them; one that somebody watches is called."""
    seen = []
    run = dispatch.implementation("dense_linear", torch.device("cpu"))
    monkeypatch.setattr(
        dispatch, "implementation", lambda name, device: lambda *given: seen.append(given[1]) or run(*given)
    )
    model = tiny_llama(layers=2).to(torch.bfloat16)
    watched = model.model.layers[1].mlp.down_proj
    calls = []
    watched.register_forward_hook(lambda *_: calls.append(1))
    blocks = [read_block(block) for block in model.model.layers]
    x = torch.randn(1, 32).bfloat16()
    for block in blocks:
        block.qkv(x), block.out(x), block.mlp(x)
    product(model.lm_head)(x)
    linears = [m for m in model.modules() if type(m) is nn.Linear and m is not watched]
    assert {id(w) for w in seen} == {id(m.weight) for m in linears} and calls == [1]
    eps = torch.finfo(torch.bfloat16).eps
    assert torch.allclose(blocks[0].out(x), model.model.layers[0].self_attn.o_proj(x), rtol=eps, atol=eps)
