"""Whether code of someone else runs when a module is called."""

from __future__ import annotations

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether its forward method was replaced, or it has hooks of a forward pass."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)
