"""Experts as lists of linears, in the place of modules that hold them as stacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.watching import is_watched
from losa_kernels import grouped_masked_lora_linear
from losa_kernels.grouped_masked_lora.groups import as_stack
from losa_kernels.masked_lora.calls import autocast_input

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

    def linears(self, name: str) -> list[nn.Module]:
        """Every expert's linear of that name; none where experts have no such linear."""
        return [expert.get_submodule(name) for expert in self if name in expert._modules]


class RoutedExperts(LinearExperts):
    """In the place of a module that gets hidden states, and of each token its experts and their weights, as under
    ``transformers.integrations.moe.use_experts_implementation``. Linears: ``up_proj`` and ``down_proj``, and
    ``gate_proj`` where the stack has gates.

    It takes the module's place, and is none of transformers' ``ALL_EXPERTS_FUNCTIONS``: masks, ranks, hooks and
    checkpoints want a module for each linear. With ``every_token`` each expert's linears are called with all tokens;
    the result is the same but for rounding.
    """

    every_token = False

    @property
    def others_are_identities(self) -> bool:
        """Whether an expert beyond the last one gives back what it gets; else it gives nothing."""
        return False

    def activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """What the experts' last linears get."""
        stack: Any = stack_of(self)
        if gate is None:
            return stack.act_fn(up)
        # Side by side, or in turns.
        return stack._apply_gate(torch.stack([gate, up], -2 if stack.is_concatenated else -1).flatten(-2))

    def forward(self, *args, **kwargs) -> Tensor:
        """The stack's own arguments: hidden states (..., hidden), and of each token its experts and their weights
        (tokens, k). (..., hidden)."""
        stack: Any = stack_of(self)
        # A class may have names of its own for the arguments.
        _, given, chosen, shares = signature(type(stack).forward).bind(stack, *args, **kwargs).arguments.values()
        # Statistics know by the tensor itself that others have the same input.
        hidden = given if given.ndim == 2 else given.reshape(-1, given.shape[-1])
        k = chosen.shape[-1]
        # Rows by expert, each expert's in the order of tokens.
        experts, order = chosen.flatten().sort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(experts, torch.arange(len(self), device=experts.device), right=True)
        x: Any = None
        if not self.every_token or self.others_are_identities:
            x = _TakeRows.apply(hidden, order // k, back, k)
        if self.every_token:
            out = self._from_every_token(hidden, order // k, ends)
        else:
            rows = GroupedRows(x, ends)
            up = rows.through(self.linears("up_proj"))
            gates = self.linears("gate_proj")
            gated = self.activated(rows.through(gates) if gates else None, up)
            out = GroupedRows(gated, ends).through(self.linears("down_proj"))
        if self.others_are_identities:
            others = torch.arange(len(out), device=out.device) >= ends[-1]
            out = torch.where(others.unsqueeze(-1), x, out)
        own = _TakeRows.apply(out, back, order, 1).unflatten(0, (len(hidden), k))
        return (own * shares.unsqueeze(-1)).sum(1).to(hidden.dtype).view_as(given)

    def _from_every_token(self, hidden: Tensor, of_row: Tensor, ends: Tensor) -> Tensor:
        *tokens, none = GroupedRows(of_row, ends).of_each
        parts = []
        for each, own in zip(self, tokens, strict=True):
            expert: Any = each
            gate = expert.gate_proj(hidden) if "gate_proj" in expert._modules else None
            parts.append(expert.down_proj(self.activated(gate, expert.up_proj(hidden)))[own])
        return torch.cat([*parts, hidden.new_zeros(len(none), hidden.shape[-1])])


class OutsideExperts(RoutedExperts):
    """In the place of a module outside of that interface (Step-3.7), which may have more choices than experts
    (LongCat-Flash)."""

    @property
    def others_are_identities(self) -> bool:
        stack: Any = stack_of(self)
        return len(stack.gate_up_proj) > len(self)

    def activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        stack: Any = stack_of(self)
        assert gate is not None, "such experts have gates"
        return (
            stack._apply_gate(torch.cat([gate, up], -1)) if hasattr(stack, "_apply_gate") else stack.act_fn(gate) * up
        )


class InnerGatedExperts(RoutedExperts):
    """In the place of a module whose activation is of a module inside, ``mlp`` (DBRX)."""

    def activated(self, gate: Tensor | None, up: Tensor) -> Tensor:
        stack: Any = stack_of(self)
        return stack.mlp.activation_fn(gate) * up


class EveryTokenExperts(LinearExperts):
    """In the place of a module that gets every token once for each expert, as zeros where the token did not choose it
    (Llama 4). Linears: ``gate_proj``, ``up_proj`` and ``down_proj``."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(experts * tokens, hidden), and back."""
        stack: Any = stack_of(self)
        chosen = hidden_states.any(-1)
        rows = chosen.nonzero().squeeze(1)
        ends = chosen.unflatten(0, (len(self), -1)).sum(1).cumsum(0)
        x = GroupedRows(hidden_states[rows], ends)
        gated = x.through(self.linears("up_proj")) * stack.act_fn(x.through(self.linears("gate_proj")))
        y = GroupedRows(gated, ends).through(self.linears("down_proj"))
        return torch.zeros_like(hidden_states).index_copy(0, rows, y.to(hidden_states.dtype))


class SortedExperts(LinearExperts):
    """In the place of a module that gets rows in the order of their experts (JetMoe). Each expert has one linear,
    ``linear``."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """(rows, in) -> (rows, out); ``expert_size``: rows of each expert."""
        ends = torch.tensor(expert_size, dtype=torch.int64, device=inputs.device).cumsum(0)
        return GroupedRows(inputs, ends).through(self.linears("linear"))


class GroupedRows:
    """Rows in the order of the linears that they are for.

    Args:
        x: (rows, in).
        ends: int64 (linears,): where each linear's rows end; rows behind them are for none.
    """

    def __init__(self, x: Tensor, ends: Tensor):
        self.x, self.ends = x, ends

    @cached_property
    def of_each(self) -> tuple[Tensor, ...]:
        """Each linear's rows, and those for none. The same tensors at every call: statistics know by them that linears
        have one input. The host waits for a GPU here."""
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()
        return self.x.split([*sizes, len(self.x) - sum(sizes)])

    @cached_property
    def cast(self) -> Tensor:
        """The rows as autocast has them: once for the linears of one input."""
        return autocast_input(self.x)

    def through(self, linears: Sequence[nn.Module]) -> Tensor:
        """Each linear's outputs of its rows, of all linears in one call where they allow it: (rows, out), 0 in the rows
        for none. A linear without rows is not called."""
        layers: list[Any] = list(linears)
        if all(map(_joins, layers)) and not _all_are_watched() and len({layer.scaling for layer in layers}) == 1:
            biases = None if layers[0].bias is None else [layer.bias for layer in layers]
            weights, masks = [layer.weight for layer in layers], [layer.mask for layer in layers]
            A, B = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
            return grouped_masked_lora_linear(self.cast, self.ends, weights, masks, A, B, layers[0].scaling, biases)
        *parts, none = self.of_each
        called = [layer(rows) for layer, rows in zip(layers, parts, strict=True) if len(rows)]
        # Under autocast the linears' outputs have another type than their inputs.
        rest = (called[0] if called else self.x).new_zeros(len(none), layers[0].out_features)
        return torch.cat([*called, rest]) if called else rest


def lay_experts_together(model: nn.Module) -> None:
    """Put the frozen weights of experts' linears on a GPU into one stack for each kind of linear, where they do not lie
    in one: of pruners that change weights, of a model that was moved, and of stacks in another order each expert has a
    tensor of its own, which a grouped product would copy at every call."""
    for experts in (module for module in model.modules() if isinstance(module, LinearExperts)):
        for name in dict.fromkeys(name for expert in experts for name in expert._modules):
            layers = experts.linears(name)
            if all(type(layer) is MaskedLoRALinear and _is_on_gpu(layer.weight) for layer in layers):
                lay_together(cast(list[MaskedLoRALinear], layers))


def _is_on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda and not isinstance(weight, DTensor)


def lay_together(layers: Sequence[MaskedLoRALinear]) -> None:
    """Put the layers' frozen weights, all of one shape, into one stack, unless they lie in one."""
    if as_stack([layer.weight for layer in layers]) is not None:
        return
    with torch.inference_mode(False), torch.no_grad():
        for layer, weight in zip(layers, torch.stack([layer.weight.detach() for layer in layers]), strict=True):
            layer.weight.data = weight


def all_get_gradients(experts: nn.ModuleList) -> bool:
    """Whether all trained linears of experts get gradients in every pass, zeros where no token came: of each kind none
    is trained, or one product multiplies them."""
    if not isinstance(experts, LinearExperts):
        return not any(parameter.requires_grad for parameter in experts.parameters())
    kinds = [experts.linears(name) for name in dict.fromkeys(name for expert in experts for name in expert._modules)]
    trained = [kind for kind in kinds if any(p.requires_grad for layer in kind for p in layer.parameters())]
    return all(type(layer) is MaskedLoRALinear and layer.dropout_p == 0 for kind in trained for layer in kind)


def _joins(layer: Any) -> bool:
    """Whether nothing but a masked-LoRA product is asked of a layer. Who watches it wants it to be called."""
    if type(layer) is not MaskedLoRALinear or not layer.adapter_enabled or (layer.training and layer.dropout_p > 0):
        return False
    watched = is_watched(layer) or layer._backward_hooks or layer._backward_pre_hooks
    return not watched and not isinstance(layer.weight, DTensor)


def _all_are_watched() -> bool:
    """Whether there are hooks of every module."""
    hooks = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(nn.modules.module, f"_global_{kind}") for kind in hooks)


class _TakeRows(torch.autograd.Function):
    """x[rows], where row i of x is taken k times: to rows back[i k] .. back[i k + k - 1]. Its gradient is a sum of k
    rows, and needs no additions into memory that others add to."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return x[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        own = grad[back]
        return own if ctx.k == 1 else own.unflatten(0, (-1, ctx.k)).sum(1), None, None, None
