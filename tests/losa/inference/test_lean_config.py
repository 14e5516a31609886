"""Which configurations the lean loop takes on, and for how many tokens; that it computes what they ask for."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from losa.inference.decoding import LeanDecoder, Unsupported
from losa.inference.generation import generate
from losa.inference.lean_config import longest_served
from losa.inference.sparsify import sparsify
from tests.helpers.tiny import EPS, tiny_tokenizer

SIZES = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
FULL = ["full_attention", "full_attention"]
MIXED = ["full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# (class, settings) of plain blocks, in spite of keys that say more elsewhere
PLAIN = {
    "llama": ("Llama", {}),
    "llama, scaled positions": ("Llama", {"rope_parameters": YARN}),
    "llama, settings of generation": ("Llama", {"num_beams": 4, "unsloth_version": "2", "temperature": 0.6}),
    "llama, of a GGUF file": ("Llama", {"_model_name_or_path": "a name", "unk_token_id": 0}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", {"head_dim": 8, "layer_types": FULL}),
    "qwen2": ("Qwen2", {"sliding_window": 4}),
    "qwen2, a window for later layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "olmo": ("Olmo", {}),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "seed": ("SeedOss", {"head_dim": 8}),
    "cwm": ("Cwm", {"head_dim": 8, "layer_types": FULL, "sliding_window": 4}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1]}),
}
WINDOWS = {
    "mistral": ("Mistral", {"sliding_window": 20}),
    # No Mistral reads these two.
    "mistral, keys of others": ("Mistral", {"sliding_window": 20, "use_sliding_window": False, "layer_types": FULL}),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 20, "layer_types": MIXED}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}),
    "cwm": ("Cwm", {"head_dim": 8, "sliding_window": 20, "layer_types": MIXED}),
}
# (class, settings, what the message names)
OTHERS = {
    "clipped": ("Olmo", {"clip_qkv": 4.0}, "clip_qkv = 4.0"),
    "residuals": ("Granite", {"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
    "embeddings": ("Granite", {"embedding_multiplier": 12}, "embedding_multiplier = 12"),
    "logits": ("Granite", {"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    "no positions": ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers = "),
    "query scaling": (
        "Llama",
        {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        "rope_parameters.llama_4_scal",
    ),
    "a part of each head": ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "longer, other positions": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "type dynamic"),
    "chunks": ("Llama", {"attention_chunk_size": 8192}, "attention_chunk_size = 8192"),
    "layer types": ("Qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types = 'chunked_att"),
    "linear attention": ("Mistral", {"sliding_window": None, "layer_types": ["linear_attention"] * 2}, "linear_att"),
    "both ways": ("Gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "not causal": ("Llama", {"is_causal": False}, "is_causal = False"),
    "capped": ("Llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "sinks": ("Llama", {"num_attention_sinks": 4}, "num_attention_sinks = 4"),
    "a key of tomorrow": ("Qwen2", {"attention_wormhole": "deep"}, "attention_wormhole = 'deep'"),
    "in each layer": ("Llama", {"attention_by_layer": [{"window": 3}, {}]}, "attention_by_layer = "),
}


def config_of(kind, settings):
    return getattr(transformers, f"{kind}Config")(
        **(SIZES | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None} | settings)
    )


def build(kind, settings):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind, settings)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(3)  # far from ties
    return model


def assert_same_logits(decoder, model, ids):
    expected = model(ids[None], use_cache=False).logits[0]
    for logits, truth in ((decoder(ids[:-1]), expected[-2]), (decoder(ids[-1:]), expected[-1])):
        assert (logits - truth).abs().max() <= 128 * EPS * truth.abs().max()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_blocks_are_served_at_any_length(name):
    model = build(*PLAIN[name])
    assert longest_served(model.config) is None
    assert_same_logits(LeanDecoder(model, 100), model, torch.randint(2, 98, (100,)))


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_served_up_to_their_length(name):
    model = build(*WINDOWS[name])
    assert longest_served(model.config) == 20
    decoder = LeanDecoder(model, 20)
    assert_same_logits(decoder, model, torch.randint(2, 98, (20,)))
    for longer in (lambda: LeanDecoder(model, 21), lambda: decoder.resize(21)):
        with pytest.raises(Unsupported, match="a sliding window of 20 tokens, fewer than the 21 of this text"):
            longer()
    decoder.resize(12)
    assert_same_logits(decoder, model, torch.randint(2, 98, (12,)))


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_refused_by_name(name):
    kind, settings, named = OTHERS[name]
    with pytest.raises(Unsupported, match="generate: ") as refused:
        longest_served(config_of(kind, settings))
    assert named in str(refused.value)


@pytest.mark.parametrize("value", [2, -1, 0.5, True, "on", [0], {"a": 1}])
def test_an_unknown_key_that_is_on(value):
    for key in ("attention_wormhole", "wormhole", "_wormhole", "wormhole_version"):
        with pytest.raises(Unsupported, match=f"does not compute {key} = "):
            longest_served(config_of("Llama", {key: value}))


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_key_that_is_off(value):
    assert longest_served(config_of("Llama", {"attention_wormhole": value})) is None
    assert longest_served(config_of("Mistral", {"wormhole_scale": 1.0, "wormhole_multiplier": 1})) == 4096


def test_what_is_wrong_with_a_window():
    for window in (True, 4.5, "16"):
        config = config_of("Llama", {})
        config.sliding_window = window
        with pytest.raises(Unsupported, match="sliding_window = "):
            longest_served(config)
    for window in (1, 2):
        assert LeanDecoder(build("Mistral", {"sliding_window": window}), window).max_length == window
    model = build("Mistral", {"sliding_window": None})
    model.config.sliding_window = 0
    with pytest.raises(Unsupported, match="a sliding window of 0 tokens"):
        LeanDecoder(model, 8)


def test_settings_beside_the_texts_own():
    """A configuration of several: what surrounds the text's counts too."""
    inner = config_of("Llama", {})
    outer = transformers.PreTrainedConfig()
    outer.text_config, outer.sound_config = inner, {"layers": 3}
    with pytest.raises(Unsupported, match="does not compute (text|sound)_config = "):
        longest_served(outer)


def test_weights_that_the_loop_would_not_read():
    model = build("Llama", {})
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(Unsupported, match=r"does not read model.layers.1.self_attn.sinks of LlamaForCausalLM"):
        LeanDecoder(model, 8)
    model = build("Llama", {})
    for linear in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        linear.weight[:, ::2] = 0
    gate = nn.Linear(32, 32, bias=False).requires_grad_(False)
    gate.weight[:, 1::2] = 0
    model.model.layers[0].self_attn.gate = gate
    with pytest.raises(Unsupported, match=r"does not read model.layers.0.self_attn.gate.packed"):
        LeanDecoder(sparsify(model), 8)
    model = build("Llama", {})
    model.adapter = nn.Linear(2, 2)
    with pytest.raises(Unsupported, match="does not read adapter.weight"):
        LeanDecoder(model, 8)


@pytest.mark.parametrize("start", [10, 40, 62])
def test_what_changes_at_a_later_token_is_found(start):
    """Nothing in the configuration says so."""
    model = build("Llama", {})
    forward = model.model.layers[1].mlp.forward

    def changed(x):
        out = forward(x)
        out[:, start:] *= 1.1
        return out

    model.model.layers[1].mlp.forward = changed
    with pytest.raises(Unsupported, match="computes something else"):
        LeanDecoder(model, 8)


@pytest.mark.parametrize("token", [0, 97])
def test_extreme_tokens_are_read(token):
    model = build("Llama", {})
    forward = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: forward(ids)
    decoder = LeanDecoder(model, 8)
    ids = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: ids.extend(args[0].flatten().tolist()))
    decoder._check(model)
    assert token in ids and len(set(ids)) > 40


def test_a_window_that_one_text_reaches(monkeypatch):
    """The decoder waits for shorter ones."""
    model, built = build("Mistral", {"sliding_window": 20}), []
    check = LeanDecoder._check
    monkeypatch.setattr(LeanDecoder, "_check", lambda self, model: built.append(1) or check(self, model))
    for count in (8, 60, 8):
        found = generate(model, tiny_tokenizer(), "hello there", max_new_tokens=count, stop_at_eos=False)
        assert (found.fallback is None) == (count == 8)
        ids = tiny_tokenizer()("hello there", return_tensors="pt").input_ids
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert found.tokens == ids[0, 11:].tolist()
    assert len(built) == 1
    model.config.sliding_window = 4
    assert "window of 4 tokens" in generate(model, tiny_tokenizer(), "hello there", max_new_tokens=8).fallback
