"""Tiny random models of every causal language model that transformers has, made from the names of its settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

WIDTH, BLOCKS, WORDS = 64, 4, 98

# What a setting of this name gets, in every configuration that has it.
SETTINGS: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim"), WIDTH)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), BLOCKS)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2)
    | dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "index_head_dim", "linear_head_dim"), 16)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 96)
    | dict.fromkeys(("intermediate_size_mlp", "dff"), 96)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48)
    | dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 48)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2)
    | dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1)
    | dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "decoder_sparse_step", "is_decoder"), 1)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 256)
    | dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 16)
    | dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "local_attention"), 16)
    | {"attention_chunk_size": 32, "swa_num_attention_heads": 4, "index_n_heads": 8, "index_topk": 256}
    | {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    | dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8)
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4, "linear_num_heads": 8}
    | {"linear_num_value_heads": 8, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "rotary_dim": 8}
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), WORDS)
    | dict.fromkeys(("residual_dropout", "embedding_dropout", "hidden_dropout", "dropout", "attention_dropout"), 0.0)
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "sep_token_id": 1, "cls_token_id": 1}
    | {"eod_token_id": 1, "use_mamba_kernels": False, "is_decoder": True}
)
MIXED = ["linear_attention", "full_attention"] * 2
SLIDING = ["sliding_attention", "full_attention"] * 2
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1}

# Names of transformers that are no rows of the table, by the reason.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "decodes what an encoder reads, by attention that has no input here": (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
        *("prophetnet", "trocr", "whisper"),
    ),
    "drafts tokens for a larger model, whose states it reads": ("gemma4_assistant", "gemma4_unified_assistant"),
    "needs a map of the words that stand for pictures": ("emu3",),
    "reads and writes codes of sounds": ("musicgen", "musicgen_melody"),
    "cuts bytes into patches by a model of its own": ("blt",),
    "needs a package beyond transformers (timm)": ("gemma3n",),
    "has a text half that is a row": ("dots3_note", "qwen4_exp"),
}

# What differs: settings by name, with "type" for another entry of the same configuration and None to leave one out.
LATENT = {"num_key_value_heads": 4}  # attention whose keys and values are made from one latent vector
DENSE_GEMMA4: dict[str, Any] = {
    "type": "gemma4_text",
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
DENSE_GEMMA4_TEXT = {key: value for key, value in DENSE_GEMMA4.items() if key != "type"} | {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "layer_types": SLIDING,
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), LATENT
    ),
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "cwm": {"bos_token_id": 1},
    "cohere2": {"layer_types": SLIDING},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dots3_note_text": {"num_key_value_heads": 4, "layer_types": ["indexed_attention"] * 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v2_lite": LATENT | {"type": "deepseek_v2", "topk_method": "greedy", "q_lora_rank": None},
    "deepseek_v4": {"head_dim": 32, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16},
    "doge_experts": {"type": "doge", "is_moe": True, "num_experts": 16, "sliding_window": None},
    "exaone4": {"layer_types": SLIDING},
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 4},
    "falcon_new": {"type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "key_multiplier": 0.5},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 5,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    },
    "gemma3n_shared": {
        "type": "gemma3n_text",
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 5,
        "layer_types": [*SLIDING[:1], *SLIDING[:2], *SLIDING[:2]],
    },
    "gemma4_text": DENSE_GEMMA4_TEXT,
    "gemma4_inputs": DENSE_GEMMA4 | {"num_kv_shared_layers": 0, "layer_types": SLIDING},
    "gemma4_shared": DENSE_GEMMA4
    | {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": [*SLIDING, *SLIDING[:2]]},
    "gemma4_experts": {
        "type": "gemma4_text",
        "enable_moe_block": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "layer_types": SLIDING,
    },
    "gpt_bigcode_heads": {"type": "gpt_bigcode", "multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "gemma4": DENSE_GEMMA4_TEXT,
    "gemma4_unified": {"num_kv_shared_layers": 0, "layer_types": SLIDING},
    "granitemoehybrid_dense": MAMBA
    | {
        "type": "granitemoehybrid",
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention"] * 2,
        "position_embedding_type": "rope",
    },
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jamba_dense": {"type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
    "kimi_linear": {"layer_types": MIXED, "mlp_layer_types": ["dense", *["sparse"] * 3], "q_lora_rank": None} | LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "floor_scale": 16},
    "llama4_half": {"type": "llama4_text", "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    "llama_tied": {"type": "llama", "tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2, "head_dim": 8} | LATENT,
    "mamba2": {"num_heads": 8, "n_groups": 1, "expand": 2},
    "minimax": {"layer_types": MIXED, "sliding_window": None},
    "mistral_full": {"type": "mistral", "sliding_window": None},
    "mixtral_window": {"type": "mixtral"},
    "mixtral": {"sliding_window": None},
    "modernbert-decoder": {"bos_token_id": 1, "layer_types": SLIDING},
    "mllama": {"bos_token_id": 1, "cross_attention_layers": [1]},
    "mpt": {"attn_config": {"attn_type": "multihead_attention"}, "left": ("intermediate_size",)},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "phi3_longrope": {
        "type": "phi3",
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    },
    "phi4_multimodal": {"num_hidden_layers": 6},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 96},
    "xmod": {"default_language": "en_XX"},
    "olmo_clip": {"type": "olmo", "clip_qkv": 3.8},
    "olmo_hybrid": {"layer_types": MIXED, "num_key_value_heads": 4},
    "opt_narrow": {"type": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "qwen2_window": {"type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_5_text": {"layer_types": MIXED},
    "qwen3_5_moe": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 16,
        "num_experts": 8,
        "moe_intermediate_size": 96,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 256,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"lru_width": WIDTH, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": WIDTH},
    "rwkv_rescaled": {"type": "rwkv", "attention_hidden_size": WIDTH, "rescale_every": 2},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "sliding_window": None},
    "xlstm": {"num_heads": 8, "qk_dim_factor": 0.5, "ffn_round_up_to_multiple_of": 16},
    "zamba": LATENT
    | {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 2,
        "n_mamba_heads": 2,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
    "zamba2": LATENT
    | {
        "n_mamba_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "mamba_ngroups": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# Models of several modalities, whose text half losa takes.
MODALITIES = (
    *("fuyu", "gemma3", "gemma4", "gemma4_unified", "git", "glm4v", "got_ocr2", "llama4"),
    *("llava", "mistral3", "mllama", "moss_transcribe_diarize", "paligemma", "phi4_multimodal", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
)
OTHERS = ("vision_config", "audio_config", "vq_config")
VISION = dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size"), WIDTH) | {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_blocks": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "deepstack_visual_indexes": [0, 1],
}


def names() -> list[str]:
    """Of all architectures, and of the variants in ``OWN``."""
    left = {name for names in LEFT_OUT.values() for name in names}
    found = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING and name not in left]
    return sorted({*found, *OWN, *MODALITIES})


def auto_class_of(name: str) -> Any:
    """The class of transformers that loads it."""
    pictures = name in MODALITIES and name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM


def config_of(name: str) -> Any:
    own = dict(OWN.get(name, {}))
    kind = CONFIG_MAPPING[own.pop("type", name)]
    left = own.pop("left", ())
    plain = kind() if name in MODALITIES else None
    others = {key: _part(value, VISION) for key in OTHERS if (value := getattr(plain, key, None)) is not None}
    if plain is not None and (text := plain.get_text_config()) is not plain:
        return kind(text_config=_part(text, SETTINGS) | own, **others)
    return kind(**{key: value for key, value in _known(kind, SETTINGS).items() if key not in left} | others | own)


def _part(plain: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration inside another one, like ``plain``."""
    found = {"model_type": plain.model_type} | _known(type(plain), settings)
    if plain.model_type.startswith(("glm4v", "qwen")):  # of half a head: time, height and width
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return found


def _known(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}
    return {key: value for key, value in settings.items() if key in fields}


def model_of(name: str, seed: int = 0) -> nn.Module:
    """A model under whose weights every block matters: norms, biases and gates are not what they begin with."""
    torch.manual_seed(seed)
    model: Any = auto_class_of(name).from_config(config_of(name)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif parameter.ndim > 1:
            parameter.mul_(3)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
