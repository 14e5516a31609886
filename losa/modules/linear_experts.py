"""Stacked experts of transformers as lists of linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """The linears of one expert, by name; ``LinearExperts`` computes with them."""

    def __init__(self, linears: Mapping[str, nn.Module]):
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class LinearExperts(nn.ModuleList):
    """Takes the place of a module of stacked experts: expert e has linears of its own, which are called with the tokens
    that chose e, if there are any.

    Args:
        stack: a module under ``transformers.integrations.moe.use_experts_implementation``. Its activation and gate
            serve on. It is no child of this module, so that its parameters do not occur twice.
        linears: of every expert: ``up_proj`` and ``down_proj``, and ``gate_proj`` where the stack has gates.
    """

    def __init__(self, stack: nn.Module, linears: Sequence[Mapping[str, nn.Module]]):
        super().__init__(map(Expert, linears))
        vars(self)["stack"] = stack

    def forward(self, *args, **kwargs) -> Tensor:
        """The stack's own arguments: hidden states (tokens, hidden), and of each token its experts and their weights
        (tokens, k); an expert beyond the last one is none. (tokens, hidden)."""
        stack: Any = vars(self)["stack"]
        # A class may have names of its own for the arguments.
        _, hidden, chosen, shares = signature(type(stack).forward).bind(stack, *args, **kwargs).arguments.values()
        k = chosen.shape[-1]
        # Rows by expert, each expert's in the order of tokens.
        experts, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=len(self))[: len(self)].tolist()
        rows = hidden[order // k]
        parts = [
            self._of_one(stack, expert, x)
            for expert, x in zip(self, rows[: sum(counts)].split(counts), strict=True)
            if len(x)
        ]
        out = torch.cat([*parts, rows.new_zeros(len(rows) - sum(counts), hidden.shape[-1])])
        out = out * shares.flatten()[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return out[back].unflatten(0, (len(hidden), k)).sum(1).to(hidden.dtype)

    @staticmethod
    def _of_one(stack: Any, expert: Any, x: Tensor) -> Tensor:
        up = expert.up_proj(x)
        if not stack.has_gate:
            inner = stack.act_fn(up)
        else:
            gate = expert.gate_proj(x)
            # Side by side, or in turns.
            both = torch.stack([gate, up], -2 if stack.is_concatenated else -1).flatten(-2)
            inner = stack._apply_gate(both)
        return expert.down_proj(inner)
