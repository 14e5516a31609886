"""Small checkpoints of several kinds: tied and untied, with biases, with other names on disk than in the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

from tests.helpers.tiny import tiny_llama, tiny_tokenizer

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "Qwen2": {"tie_word_embeddings": False},  # biases
    "GPTNeoX": {"tie_word_embeddings": False},  # another name on disk, fused projections
    "Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16},  # stacked experts
    "OPT": {"ffn_dim": 50, "word_embed_proj_dim": 32},  # tied, learned positions
}


def family(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | FAMILIES[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def save_families(directory: Path, names: Iterable[str] = (*FAMILIES, "llama", "tied")) -> list[str]:
    """Save checkpoints of these kinds with a tokenizer; their names in ``directory``."""
    for name in names:
        model = family(name) if name in FAMILIES else tiny_llama(layers=2, tie_word_embeddings=name == "tied")
        model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
        # Several files and an index for one of them.
        model.save_pretrained(directory / name, max_shard_size="20KB" if name == "llama" else "1GB")
        tiny_tokenizer().save_pretrained(directory / name)
    return list(names)
