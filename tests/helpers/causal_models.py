"""Tiny causal models whose logits come about in different ways."""

from __future__ import annotations

import torch
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tests.helpers.tiny import CHARACTERS, tiny_llama

VOCABULARY = len(CHARACTERS) + 2
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_gemma2():
    torch.manual_seed(0)
    # A cap of 0.2 on logits that large bends them visibly.
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.2)).eval()
    model.model.embed_tokens.weight.data.mul_(20)
    return model


def tiny_cohere():
    torch.manual_seed(0)
    settings = {k: v for k, v in SMALL.items() if k != "head_dim"}
    return CohereForCausalLM(CohereConfig(**settings, logit_scale=3.0, pad_token_id=0)).eval()


def with_bias():
    model = tiny_llama(layers=2)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)))
    return model


def tied():
    return tiny_llama(layers=2, tie_word_embeddings=True)


MODELS = {"llama": tiny_llama, "tied": tied, "bias": with_bias, "softcapping": tiny_gemma2, "scaled": tiny_cohere}
