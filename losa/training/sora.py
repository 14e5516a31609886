"""SoRA's proximal step: an L1 penalty that closes gates of adapters for components that are not worth it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.model.wrapping import wrapped_linears
from losa.modules.gated_lora import SoRALinear
from losa.training.extension import Extension


def soft_threshold(gate: Tensor, threshold: float) -> Tensor:
    """sign(g) max(|g| - threshold, 0), the proximal map of threshold * ||g||_1 (Ding et al. 2023, Eq. 7): a new tensor
    of the same shape and dtype."""
    return gate.sign() * (gate.abs() - threshold).clamp_(min=0)


class GatePenalty(Extension):
    """After each update with learning rate eta, every gate g becomes soft_threshold(g, eta * weight).

    Args:
        model: with ``SoRALinear`` layers, whole or sharded.
        weight: lambda of the penalty lambda * ||g||_1, at least 0.
    """

    def __init__(self, model: nn.Module, weight: float):
        self.model = model
        self.weight = weight

    @torch.no_grad()
    def after_update(self, step: int, learning_rate: float) -> None:
        for layer in wrapped_linears(self.model).values():
            assert isinstance(layer, SoRALinear)
            gate = layer.gate
            rows = gate.to_local() if isinstance(gate, DTensor) else gate
            rows.copy_(soft_threshold(rows, learning_rate * self.weight))
