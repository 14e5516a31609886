"""A norm whose weights are trained, around the norm that it was."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class TrainedNorm(nn.Module):
    """A norm with trained copies of its parameters.

    ``norm`` is the module as it was given: it is frozen, and nothing writes to it. Each of its parameters, such as
    ``weight`` (hidden,), has a trained copy of the same shape here, ``trained_weight``, in fp32 (fp64 for fp64). All
    other public attributes are those of ``norm``; ``weight`` is what ``forward`` uses. The copies are rounded to the
    dtype of the given parameters when the norm runs, so that ``merge`` changes no result.

    With ``adapter_enabled`` False the norm runs as it was given (see ``dense_mode``).

    Args:
        norm: a module without children whose parameters are whole.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.adapter_enabled = True
        self.norm = norm.requires_grad_(False)
        for name, parameter in norm.named_parameters():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self.register_parameter(f"trained_{name}", nn.Parameter(parameter.detach().to(wide, copy=True)))

    def __getattr__(self, name: str) -> Any:
        # Models read a norm's weight, for its dtype or for a kernel of their own, and its eps.
        parameters, norm = self.__dict__.get("_parameters", {}), self.__dict__.get("_modules", {}).get("norm")
        if norm is None or name in parameters or name in self._modules or name.startswith("_"):
            return super().__getattr__(name)
        trained, given = parameters.get(f"trained_{name}"), getattr(norm, name)
        return given if trained is None or not self.adapter_enabled else trained.to(given.dtype)

    def forward(self, *args, **kwargs) -> Any:
        """What the norm returns."""
        if not self.adapter_enabled:
            return self.norm(*args, **kwargs)
        return torch.func.functional_call(self.norm, self._rounded(), args, kwargs)

    def merge(self) -> nn.Module:
        """A frozen norm of the given kind with the trained values, in new memory."""
        merged = copy.deepcopy(self.norm)
        for name, value in self._rounded().items():
            merged.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=False))
        return merged

    def unwrap(self) -> nn.Module:
        """The norm as it was given."""
        return self.norm

    def _rounded(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"trained_{name}").to(p.dtype) for name, p in self.norm.named_parameters()}
