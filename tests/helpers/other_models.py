"""Small models of other kinds than the lean loop's, and one of its kind."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.helpers.tiny import tiny_llama

TOKENS = {"vocab_size": 98, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None}
SIZES = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Of other kinds than the lean loop's: (class, settings)
OTHERS = {
    "learned positions": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "alibi": ("Bloom", TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "no blocks of linears": ("GPT2", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "recurrent": ("Mamba", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "windows": ("Mistral", SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 4}),
}


def other(name, **settings):
    torch.manual_seed(0)
    kind, own = OTHERS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**(own | settings)))
    return scaled(model)


def llama():
    return scaled(tiny_llama(layers=2))


def scaled(model):
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim == 2:
            parameter.mul_(3 if "Llama" in type(model).__name__ else 20)  # far from ties
    return model.eval()


def halved(model):
    """Every second column of its blocks' linears is zero."""
    for linear in (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name):
        linear.weight[:, ::2] = 0
    return model


def save(model, tokenizer, directory):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def likeliest(model, ids, count):
    """Everything anew for each token."""
    ids = torch.tensor([ids])
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[0, -count:].tolist()
