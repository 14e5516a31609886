"""What a checkpoint's generation settings mean for ``generate``: end tokens, and settings that are not applied."""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import nn

logger = logging.getLogger("losa")

# Settings of generation_config.json that change no text, or that arguments of ``generate`` replace.
_SILENT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"),
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_p"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("disable_compile", "compile_config", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
)
# Settings that matter only where tokens are drawn.
_OF_DRAWS = ("top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Settings for which 1 means that they are off.
_FACTORS = ("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale", "num_beams")
_named: WeakSet[nn.Module] = WeakSet()


def warn_of_ignored(model: nn.Module, drawing: bool) -> None:
    """Warn once a model of settings in its generation_config.json that would change the text and are not applied."""
    stated = getattr(model, "generation_config", None)
    if stated is None or model in _named:
        return
    names = [
        f"{name}={value!r}"
        for name, value in stated.to_diff_dict().items()
        if value
        and not (name in _SILENT or name.startswith("_") or (name in _OF_DRAWS and not drawing))
        and not (name in _FACTORS and value == 1)
    ]
    if names:
        _named.add(model)
        logger.warning("generate: settings of the checkpoint that are not applied: %s", ", ".join(names))


def end_tokens(model: nn.Module, tokenizer) -> set[int]:
    """Tokens that end a text, by the checkpoint's settings and its tokenizer."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    return {token for token in (*stated, tokenizer.eos_token_id) if token is not None}
