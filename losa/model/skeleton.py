"""A model as config.json describes it, without weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from losa.errors import ModelError, reason
from losa.model.auto_class import auto_class
from losa.storage.kinds import read_config


def skeleton(directory: Path) -> nn.Module:
    """The model that config.json describes, on meta.

    Raises:
        ModelError: no config.json, or transformers cannot build a model from it.
    """
    return _build(directory, torch.device("meta"), None, torch.float32)


def empty_model(
    directory: Path,
    dtype: torch.dtype | None = None,
    fallback: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model that config.json describes, with its parameters on meta and its buffers on the CPU: those that no
    checkpoint holds (rotary frequencies) have their values. No weights are tied.

    Args:
        dtype: of the weights; None: the type that config.json states.
        fallback: of the weights, where config.json states none.

    Raises:
        ModelError: as ``skeleton``.
    """
    from accelerate import init_empty_weights

    return _build(directory, init_empty_weights(include_buffers=False), dtype, fallback, trust_remote_code)


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move a model's buffers, but not its parameters, in place."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _build(
    directory: Path,
    place: AbstractContextManager,
    dtype: torch.dtype | None,
    fallback: torch.dtype,
    trust_remote_code: bool = False,
) -> nn.Module:
    from transformers import AutoConfig

    read_config(directory)
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(directory, **trust)
        # The model does not depend on how weights are stored, and transformers knows only some of these formats.
        config.__dict__.pop("quantization_config", None)
        chosen = dtype or config.dtype or config.get_text_config().dtype or fallback
        with place:
            return auto_class(config).from_config(config, dtype=chosen, **trust)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the model cannot be built from config.json ({reason(error)})") from error
