"""``save_pretrained`` of models whose linears were replaced, and tied embeddings in config.json."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import ModelError
from losa.model.replacing import restore_tensors
from losa.modules.linear_experts import stack_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear
from losa.storage.files import write_json
from losa.storage.json_files import read_json

_TIED = "tie_word_embeddings"


def guard_saving(model: nn.Module) -> None:
    """Make ``model.save_pretrained`` (and so ``push_to_hub``) write a checkpoint that transformers loads.

    Packed linears are written dense, under their ordinary names, and experts as the stack that they were. All dense
    weights of the model are in memory meanwhile (``losa unpack`` holds one block at a time). A model with adapters is
    refused, since the file would hold the weights without their adapters. A model that is not of transformers is left
    as it is.
    """
    module: Any
    for module in model.modules():  # parts of the model can be saved alone
        if hasattr(type(module), "save_pretrained"):
            # A partial, not a bound method: pickle would restore a bound method as the method of the class.
            module.save_pretrained = partial(save_pretrained, module)


def save_pretrained(model: Any, *args, **kwargs):
    """Takes the place of the model's own ``save_pretrained``, with the same arguments."""
    save = type(model).save_pretrained
    wrapped = [name for name, module in model.named_modules() if isinstance(module, MaskedLoRALinear)]
    if wrapped:
        raise ModelError(
            f"save_pretrained: the model has {len(wrapped)} adapters ({wrapped[0]}, ...), which transformers cannot "
            "load; merge_model first, or torch.save(model.state_dict(), ...) to go on later"
        )
    if any(isinstance(module, SparseLinear) or stack_of(module) is not None for module in model.modules()):
        call = signature(save).bind(model, *args, **kwargs)
        call.arguments["state_dict"] = dense_state_dict(model, call.arguments.get("state_dict"))
        return save(*call.args, **call.kwargs)
    return save(model, *args, **kwargs)


def dense_state_dict(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state dict, or ``state_dict``, with dense weights in place of packed ones, and other forms of linears
    (``losa.model.forms``) as they were."""
    found = dict(model.state_dict() if state_dict is None else state_dict)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            for part in module.packed.tensors():
                found.pop(f"{name}.{part}", None)
            found[f"{name}.weight"] = module.packed.unpack()
    for name, module in model.named_modules():
        if (stack := stack_of(module)) is not None:
            restore_tensors(stack, name, found)
    return found


def untied_though_stated(model: Any) -> bool:
    """Whether the config states that input and output embeddings are one tensor, though they differ."""
    if not getattr(model.config.get_text_config(), _TIED, False) and not getattr(model.config, _TIED, False):
        return False
    output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    first, second = (getattr(module, "weight", None) for module in (output, inputs))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first is second:
        return False
    return not torch.equal(first, second)


def state_untied(directory: Path) -> None:
    """Write into config.json that the output layer has its own weights."""
    path = directory / "config.json"
    config: Any = read_json(path)
    for part in [value for value in config.values() if isinstance(value, dict) and _TIED in value]:
        part[_TIED] = False
    write_json(path, config | {_TIED: False})
