"""Small decoders of many kinds of transformers, with random weights under which every block matters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

COMMON = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


# Attention by latent vectors.
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Kind:
    """``dense``: ends of the names of linears that cannot be pruned, for a reason that losa gives; ``routers``: of
    those that choose experts, where they are linears."""

    name: str
    settings: dict = field(default_factory=dict)
    layers: int = 2
    dense: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Llama"),
        Kind("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
        Kind("GPTNeoX"),
        # A linear in other words, and blocks that add in place.
        Kind("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        # A weight that the model reads itself.
        Kind("Mamba", {"state_size": 8}, dense=("dt_proj",)),
        # Blocks of two classes.
        Kind(
            "Jamba",
            {
                "attn_layer_period": 2,
                "attn_layer_offset": 1,
                "num_experts": 1,
                "use_mamba_kernels": False,
                "mamba_d_state": 4,
            },
            layers=3,
            dense=("dt_proj",),
        ),
        # Linears with an output for each of four heads, too narrow for some ranks.
        Kind("OlmoHybrid", layers=4),
        # Transposed linears.
        Kind("GPT2", dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"n_positions": 256}),
        # Stacks of experts: gate and up one after the other, each with a router; shared experts; dense blocks before.
        Kind("Mixtral", {"num_local_experts": 4}),
        Kind("Qwen3Moe", {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
        Kind("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        Kind("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0}),
        Kind(
            "DeepseekV3",
            {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 16,
                "first_k_dense_replace": 1,
                **LATENT,
                "norm_topk_prob": True,
            },
        ),
        # Transposed stacks that get every token for each expert, and a shared expert that is added in place.
        Kind(
            "Llama4Text",
            {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 8, "interleave_moe_layer_step": 1},
            routers=("router",),
        ),
        # One stack for each of the experts' matrices, with rows in the order of experts; attention of experts.
        Kind("JetMoe", {"num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": 0.0}, routers=("router.layer",)),
        # Matrices of the experts one below the other, in a module inside; a router that is a plain linear.
        Kind(
            "Dbrx",
            {
                "d_model": 32,
                "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
                "resid_pdrop": 0.0,
            },
            routers=("router.layer",),
        ),
        # Stacks of three experts, beside two choices that give a token back as it is.
        Kind(
            "LongcatFlash",
            {
                "n_routed_experts": 3,
                "zero_expert_num": 2,
                "moe_topk": 3,
                "expert_ffn_hidden_size": 24,
                "ffn_hidden_size": 64,
                "head_dim": 8,
                **LATENT,
            },
            layers=4,  # two attentions a block
            routers=("classifier",),
        ),
        # Transposed stacks with biases, gate and up in turns.
        Kind("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 16}),
    )
}


def of_kind(kind: Kind, seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind.name}Config")
    own = COMMON | {"num_hidden_layers": kind.layers} | kind.settings | settings
    model = transformers.AutoModelForCausalLM.from_config(config(**own)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    return model
