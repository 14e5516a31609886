"""Tiny random models and a character tokenizer, built in the test: nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from losa.model.wrapping import wrap_model

CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
VOCABULARY = 97
IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
EPS = torch.finfo(torch.float32).eps


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


def tiny_llama(layers: int = 4, hidden: int = 32, seed: int = 0, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def wrap(model, **settings):
    return wrap_model(model, **({"rank": 4, "scaling": 2.0} | settings))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def assert_same_function(ours, truth):
    """Each of 3 blocks rounds some 10 times; a wrong weight or a lost bias is off by 1e-3 and more."""
    assert (ours - truth).abs().max() <= 64 * EPS * truth.abs().max()


@torch.no_grad()
def randomise(layers, seed=1):
    """Random masks, and adapters as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.6)
        layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=generator))


def twice(model):
    """The second block's MLP multiplies by one weight where it has two."""
    model.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.gate_proj
    return model
