"""A model as config.json describes it, without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from losa.errors import ModelError, reason
from losa.storage.kinds import read_config


def skeleton(directory: Path, meta: bool = True, fallback: torch.dtype = torch.float32) -> nn.Module:
    """The model that config.json describes, without weights.

    Args:
        meta: create everything on meta; else the caller's context decides where.
        fallback: type of the weights where config.json states none.

    Raises:
        ModelError: no config.json, or transformers cannot build a model from it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        # The model does not depend on how weights are stored, and transformers knows only some of these formats.
        config.__dict__.pop("quantization_config", None)
        dtype = config.dtype or config.get_text_config().dtype or fallback
        if not meta:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the model cannot be built from config.json ({reason(error)})") from error
