"""Experts as lists of linears, in the place of modules that hold them as stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

_STACK = "stack"


def stack_of(module: nn.Module) -> nn.Module | None:
    """The module of another form (``losa.model.forms``) whose place a module took; it is no child of it."""
    return vars(module).get(_STACK)


def stand_for(module: nn.Module, stack: nn.Module | None) -> nn.Module:
    """``module``, which takes the place of ``stack``, if there is one."""
    if stack is not None:
        vars(module)[_STACK] = stack
    return module


@contextmanager
def every_token_to_every_expert(module: nn.Module) -> Iterator[None]:
    """Within the context experts inside ``module`` are called with all tokens (``RoutedExperts``)."""
    experts = [m for m in module.modules() if isinstance(m, RoutedExperts)]
    for each in experts:
        each.every_token = True
    try:
        yield
    finally:
        for each in experts:
            each.every_token = False


class Expert(nn.Module):
    """The linears of one expert, by name; ``LinearExperts`` computes with them."""


class LinearExperts(nn.ModuleList):
    """Expert e has linears of its own, which are called with the tokens that chose e, if there are any.

    Args:
        stack: the module whose place this one takes. Its activation and gate serve on. It is no child of this module,
            so that its parameters do not occur twice.
        linears: by "NUMBER.NAME", of every expert in turn.
    """

    def __init__(self, stack: nn.Module, linears: Mapping[str, nn.Module]):
        super().__init__()
        stand_for(self, stack)
        for part, linear in linears.items():
            number, _, name = part.partition(".")
            if int(number) == len(self):
                self.append(Expert())
            self[-1].add_module(name, linear)


class RoutedExperts(LinearExperts):
    """In the place of a module under ``transformers.integrations.moe.use_experts_implementation``. Linears: ``up_proj``
    and ``down_proj``, and ``gate_proj`` where the stack has gates.

    With ``every_token`` each expert's linears are called with all tokens; the result is the same but for rounding.
    """

    every_token = False

    def forward(self, *args, **kwargs) -> Tensor:
        """The stack's own arguments: hidden states (tokens, hidden), and of each token its experts and their weights
        (tokens, k); an expert beyond the last one is none. (tokens, hidden)."""
        stack: Any = stack_of(self)
        # A class may have names of its own for the arguments.
        _, hidden, chosen, shares = signature(type(stack).forward).bind(stack, *args, **kwargs).arguments.values()
        k = chosen.shape[-1]
        # Rows by expert, each expert's in the order of tokens.
        experts, order = chosen.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=len(self))[: len(self)].tolist()
        of_row = order // k
        if self.every_token:
            tokens = of_row[: sum(counts)].split(counts)
            parts = [self._of_one(stack, expert, hidden)[own] for expert, own in zip(self, tokens, strict=True)]
        else:
            rows = hidden[of_row[: sum(counts)]].split(counts)
            parts = [self._of_one(stack, expert, x) for expert, x in zip(self, rows, strict=True) if len(x)]
        out = torch.cat([*parts, hidden.new_zeros(len(of_row) - sum(counts), hidden.shape[-1])])
        out = out * shares.flatten()[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return out[back].unflatten(0, (len(hidden), k)).sum(1).to(hidden.dtype)

    @staticmethod
    def _of_one(stack: Any, expert: Any, x: Tensor) -> Tensor:
        up = expert.up_proj(x)
        if not stack.has_gate:
            return expert.down_proj(stack.act_fn(up))
        # Side by side, or in turns.
        both = torch.stack([expert.gate_proj(x), up], -2 if stack.is_concatenated else -1).flatten(-2)
        return expert.down_proj(stack._apply_gate(both))


class EveryTokenExperts(LinearExperts):
    """In the place of a module that gets every token once for each expert, as zeros where the token did not choose it
    (Llama 4). Linears: ``gate_proj``, ``up_proj`` and ``down_proj``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(experts * tokens, hidden), and back."""
        stack: Any = stack_of(self)
        rows = hidden_states.unflatten(0, (len(self), -1))
        outputs = []
        for expert, x in zip(self, rows, strict=True):
            each: Any = expert
            chosen = x.any(-1).nonzero().squeeze(1)
            x = x[chosen]
            y = each.down_proj(each.up_proj(x) * stack.act_fn(each.gate_proj(x))) if len(x) else x
            outputs.append(hidden_states.new_zeros(rows.shape[1:]).index_copy(0, chosen, y.to(hidden_states.dtype)))
        return torch.cat(outputs)


class SortedExperts(LinearExperts):
    """In the place of a module that gets rows in the order of their experts (JetMoe). Each expert has one linear,
    ``linear``."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """(rows, in) -> (rows, out); ``expert_size``: rows of each expert."""
        linears: list[Any] = [expert.get_submodule("linear") for expert in self]
        parts = [linear(x) for linear, x in zip(linears, inputs.split(expert_size), strict=True) if len(x)]
        return torch.cat(parts) if parts else inputs.new_zeros(0, cast(Any, stack_of(self)).weight.shape[1])
