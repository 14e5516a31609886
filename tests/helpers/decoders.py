"""Small random decoders of many architectures, packed ones, and their text by transformers."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from losa.inference.sparsify import sparsify
from tests.helpers.tiny import (
    VOCABULARY,
)

LAYERS = 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# The linears of a block of the LLaMA kind.
GATED = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero after initialisation, where a lost bias would not show
            nn.init.normal_(parameter, std=0.1)
    return model


LLAMA_KIND = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"head_dim": 8, "sliding_window": None}),
}


def build(config_class, settings):
    own = {"vocab_size": 98, "num_hidden_layers": 2, "max_position_embeddings": 256, "eos_token_id": 1}
    model = random_model(config_class(**(COMMON | own | settings)))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # far from ties
    return model.requires_grad_(False)


def thin(model):
    """Half of the weights of every block linear, packed."""
    for linear in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        linear.weight.mul_(torch.rand_like(linear.weight) > 0.5)
    return sparsify(model, min_sparsity=0.3)


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()
