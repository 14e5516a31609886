"""What is trained, by how an optimiser steps it."""

from __future__ import annotations

from typing import Any

from torch import nn

from losa.model.norms import trained_norms
from losa.recipe.sections import TrainConfig


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The parameters that require a gradient, as groups of an optimiser. ``rate`` of a group is its factor on the
    learning rate.

    An adapter's B is stepped at ``lora_plus`` times the rate of its A (Hayou et al. 2024, "LoRA+"). Weight decay would
    pull a norm's weights towards 0, which is no neutral value for them.
    """
    norms = {id(p) for norm in trained_norms(model).values() for p in norm.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = config.lora_plus if "lora_B" in name.split(".") else 1.0
            decay = 0.0 if id(parameter) in norms else config.weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": own, "rate": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]
