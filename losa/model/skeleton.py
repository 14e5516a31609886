"""A model as config.json describes it, without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from losa.errors import ModelError, reason
from losa.storage.kinds import read_config


def skeleton(directory: Path, meta: bool = True, fallback: torch.dtype = torch.float32) -> nn.Module:
    """The model that config.json describes, without weights: all on meta, or where the context creates them.

    ``fallback``: the weights' type where config.json states none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    read_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        # How weights are stored is not the model's business, and not every transformers knows every format.
        config.__dict__.pop("quantization_config", None)
        dtype = config.dtype or config.get_text_config().dtype or fallback
        if not meta:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the model cannot be built from config.json ({reason(error)})") from error
