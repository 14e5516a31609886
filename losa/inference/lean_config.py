"""Configurations of models that the lean loop computes. A key that is unknown here and not off refuses the model."""

from __future__ import annotations

import functools

from losa.errors import LosaError

# Keys whose values the loop gets from the modules that it calls, or from the shapes of weights.
_IN_THE_MODULES = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
attention_bias attention_out_bias qkv_bias mlp_bias bias use_bias use_qkv_bias hidden_act hidden_activation
rms_norm_eps layer_norm_eps norm_eps norm_epsilon attention_multiplier query_pre_attn_scalar
tie_word_embeddings max_position_embeddings rope_theta default_theta quantization_config
num_experts num_local_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size norm_topk_prob
decoder_sparse_step mlp_only_layers router_jitter_noise
"""
# Keys that play no part in a forward pass in evaluation mode.
_NO_PART = """
architectures model_type transformers_version dtype torch_dtype auto_map _commit_hash tokenizer_class initializer_range
use_cache return_dict output_attentions output_hidden_states chunk_size_feed_forward pretraining_tp id2label label2id
num_labels problem_type attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
attention_dropout residual_dropout hidden_dropout embedding_dropout embd_pdrop resid_pdrop dropout mlp_dropout
output_router_logits router_aux_loss_coef
max_sequence_length model_max_length is_llama_config unsloth_fixed unsloth_version transformers.js_config
"""
# Ends of further such keys; a GGUF file brings _model_name_or_path.
_NO_PART_ENDS = ("name_or_path", "_token_id")
_KNOWN = frozenset((_IN_THE_MODULES + _NO_PART).split())
# Keys of rotary positions. The model's rotary embedding uses them, and the loop takes cosines and sines from it.
_IN_ROPE = """
rope_theta type factor attention_factor beta_fast beta_slow low_freq_factor high_freq_factor truncate finetuned
original_max_position_embeddings max_position_embeddings mscale mscale_all_dim
"""
_KNOWN_IN_ROPE = frozenset(_IN_ROPE.split())
_ROPE = ("rope_parameters", "rope_scaling")
# Kinds of rotary positions whose frequencies do not depend on the length of the text.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
# Ends of keys for which 1 means that they are off.
_FACTORS = ("factor", "multiplier", "scale", "scaling")
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_NO_ROPE = ("no_rope_layers", "no_rope_layer_interval")


class Unsupported(LosaError):
    """The model's blocks are not of the kind that the lean loop computes."""


def longest_served(config) -> int | None:
    """The longest text, in tokens, that the lean loop reads as the model does, from a transformers configuration; None:
    there is no limit.

    Raises:
        Unsupported: the loop does not compute what a key of the configuration asks for; names key and value.
    """
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError) as error:
        raise Unsupported(
            f"generate: the model's configuration does not say which part is the text's ({error})"
        ) from error
    for part in [config] if text is config else [config, text]:
        for key, value in part.to_dict().items():
            _check(part, str(key), value)
    return _window(text)


@functools.cache
def _of_all() -> tuple[frozenset[str], dict]:
    """Names of generation settings, which a configuration may hold too, and the default values of any configuration."""
    from transformers import GenerationConfig, PreTrainedConfig

    return frozenset(vars(GenerationConfig())), PreTrainedConfig().to_dict()


def _check(config, key: str, value) -> None:
    if key in _WINDOWS:  # see _window
        return
    if key in _ROPE and isinstance(value, dict):
        _check_rope(key, value)
        return
    if key in _NO_ROPE:
        # 1 means that a layer has positions. transformers makes the list from the interval if it is not given.
        layers = getattr(config, _NO_ROPE[0], None)
        fine = all(layers) if layers else _off(key, value)
    elif key == "is_causal":
        fine = value is True
    else:
        generation, default = _of_all()
        usual = key in default and value == default[key]
        known = key in _KNOWN or key.endswith(_NO_PART_ENDS) or key in generation
        fine = known or usual or _off(key, value)
    if not fine:
        _refuse(key, value)


def _check_rope(name: str, settings: dict) -> None:
    for key, value in settings.items():
        if key == "rope_type" or (key == "type" and "rope_type" not in settings):
            if value not in _FIXED_ROPE:
                raise Unsupported(f"generate: rotary positions of type {value} ({name}) depend on the length")
        elif key not in _KNOWN_IN_ROPE and not _off(key, value):
            _refuse(f"{name}.{key}", value)


def _window(config) -> int | None:
    """The sliding window of the layer that has the shortest one, in tokens; None: every layer attends to all tokens.

    A file may hold any key, so only the class of a configuration tells whether its model reads ``layer_types`` or
    ``use_sliding_window``.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                _refuse("layer_types", kind)
        if "sliding_attention" in kinds and window is None:
            _refuse("layer_types", "sliding_attention")
        if "sliding_attention" not in kinds and hasattr(type(config), "layer_types"):
            return None
    elif getattr(config, "use_sliding_window", None) is False and hasattr(type(config), "use_sliding_window"):
        return None
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        _refuse("sliding_window", window)
    return window


def _off(key: str, value) -> bool:
    if isinstance(value, int | float) and value == 1 and not isinstance(value, bool):
        return key.endswith(_FACTORS)
    return not value


def _refuse(key: str, value) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    raise Unsupported(f"generate: the lean loop does not compute {key} = {shown} of the model's configuration")
