"""What is trained, by how an optimiser steps it."""

from __future__ import annotations

from typing import Any

from torch import nn

from losa.model.norms import trained_norms
from losa.model.wrapping import wrapped_linears


def parameter_groups(
    module: nn.Module, *, lora_plus: float = 1.0, norms: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters that require a gradient, as groups of an optimiser. ``rate`` of a group is its factor on the
    learning rate.

    An adapter's B is stepped at ``lora_plus`` times the rate of its A (Hayou et al. 2024, "LoRA+"); a layer that trains
    weights has no B. Trained norms are stepped at ``norms`` times the rate, None as 1: a full parameter bears less than
    an adapter does. Weight decay would pull a norm's weights towards 0, not towards where they began.

    Args:
        module: a wrapped model, or a part of it.
    """
    own = {id(p) for norm in trained_norms(module).values() for p in norm.parameters(recurse=False)}
    second = {id(layer.lora_B) for layer in wrapped_linears(module).values() if layer.rank}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in own:
            how = 1.0 if norms is None else norms, 0.0
        else:
            how = lora_plus if id(parameter) in second else 1.0, weight_decay
        groups.setdefault(how, []).append(parameter)
    return [{"params": alike, "rate": rate, "weight_decay": decay} for (rate, decay), alike in groups.items()]
