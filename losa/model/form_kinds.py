"""The forms in which models hold linears, each told by its structure: what its linears are, and what calls them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from losa.modules.linear_experts import (
    EveryTokenExperts,
    InnerGatedExperts,
    LinearExperts,
    OutsideExperts,
    RoutedExperts,
    SortedExperts,
)

# What transformers.integrations.moe.use_experts_implementation says of every module of a class.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel")


# Linears of an expert that lie in one tensor of a module of experts, by the tensor's name within it.
STACKED_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
    "mlp.w1": ("gate_proj",),
    "mlp.v1": ("up_proj",),
    "mlp.w2": ("down_proj",),
}


class Form(ABC):
    """One form: a module of it has no parameters but those in which the weights of its linears lie, and biases, whose
    names end so. The one linear of a module that holds no experts takes its place. ``inner``: names of children that
    hold the parameters."""

    inner: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def matches(self, module: Any) -> bool:
        """Whether a module is of this form."""

    @abstractmethod
    def parts(self, module: Any) -> dict[str, nn.Linear]:
        """Its linears by name within it, frozen and over views of its parameters."""

    def tensors(self, module: Any) -> dict[str, nn.Parameter]:
        """The parameters of a module, by name within it."""
        found = dict(module.named_parameters(recurse=False))
        for name in self.inner:
            found |= module.get_submodule(name).named_parameters(prefix=name)
        return found

    def weights(self, module: Any) -> dict[str, int]:
        """How many weights of its linears lie in each parameter, by name."""
        return {name: tensor.numel() for name, tensor in self.tensors(module).items() if not name.endswith("bias")}


class ExpertForm(Form):
    """A form of experts. ``experts``: the class that takes the place of a module, which is trusted where its linears
    give what it gives."""

    experts: ClassVar[type[LinearExperts]]

    @abstractmethod
    def arguments(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        """Random ones, of a few tokens, for experts to be tried with."""

    @abstractmethod
    def choices(self, module: Any) -> int:
        """Among how many experts a token chooses."""

    def rows(self, module: Any, parameter: str) -> tuple[int, tuple[str, ...]] | None:
        """Of a tensor whose rows hold the linears (out, in) of one expert each, one after the other: how many of the
        rows do, which are the first ones, and the linears' names. None of another tensor."""
        return None


class Transposed(Form):
    """transformers' ``Conv1D``: a weight (in, out)."""

    def matches(self, module: Any) -> bool:
        return isinstance(module, _conv1d())

    def parts(self, module: Any) -> dict[str, nn.Linear]:
        return {"": _view(module.weight.T, module.bias)}


@functools.cache
def _conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


class Routed(ExpertForm):
    """Stacks under transformers' experts interface, all of whose experts are in this process, without a norm."""

    experts = RoutedExperts

    def matches(self, module: Any) -> bool:
        if not all(hasattr(module, flag) for flag in _FLAGS):
            return False
        if module._is_expert_parallel or module.has_post_expert_norm:
            return False
        return _are_stacks(module, "gate_up_proj" if module.has_gate else "up_proj", "down_proj")

    def parts(self, module: Any) -> dict[str, nn.Linear]:
        both = ("gate_up_proj",) if module.has_gate else ()
        found: dict[str, nn.Linear] = {}
        for e in range(len(module.down_proj)):
            for name in (*both, *(() if both else ("up_proj",)), "down_proj"):
                weight = getattr(module, name)[e]
                weight = weight.T if module.is_transposed else weight
                bias = getattr(module, f"{name}_bias")[e] if module.has_bias else None
                if name == "gate_up_proj":
                    found |= _halves(f"{e}.", weight, bias, module.is_concatenated)
                else:
                    found[f"{e}.{name}"] = _view(weight, bias)
        return found

    def arguments(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        weight = module.down_proj
        x = torch.randn(8, weight.shape[2 if module.is_transposed else 1], generator=generator)
        return _routed(x, len(weight), weight, generator)

    def choices(self, module: Any) -> int:
        return len(module.down_proj)

    def rows(self, module: Any, parameter: str) -> tuple[int, tuple[str, ...]] | None:
        in_rows = not module.is_transposed and module.is_concatenated and parameter in STACKED_PARTS
        return (len(module.down_proj), STACKED_PARTS[parameter]) if in_rows else None


class RoutedOutside(ExpertForm):
    """Stacks as ``Routed`` has them, outside of that interface (Step-3.7). LongCat-Flash has fewer experts than a token
    chooses among: the others give the token back as it is, and nothing reads their rows in the stack of gates."""

    experts = OutsideExperts

    def matches(self, module: Any) -> bool:
        if set(module._parameters) != {"gate_up_proj", "down_proj"} or hasattr(module, _FLAGS[0]):
            return False
        both, down = module.gate_up_proj, module.down_proj
        if not hasattr(module, "act_fn") or any(tensor is None or tensor.ndim != 3 for tensor in (both, down)):
            return False
        return len(both) >= len(down) and both.shape[1:] == (2 * down.shape[2], down.shape[1])

    def parts(self, module: Any) -> dict[str, nn.Linear]:
        return _gated(module.gate_up_proj, module.down_proj)

    def weights(self, module: Any) -> dict[str, int]:
        stacks = self.tensors(module)
        return {name: len(module.down_proj) * prod(stack.shape[1:]) for name, stack in stacks.items()}

    def choices(self, module: Any) -> int:
        return len(module.gate_up_proj)

    def arguments(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        weight, count = module.down_proj, len(module.down_proj)
        x, chosen, shares = _routed(torch.randn(8, weight.shape[1], generator=generator), count, weight, generator)
        chosen[:2] = self.choices(module) - 1  # no expert, where there are more choices
        return x, chosen, shares

    def rows(self, module: Any, parameter: str) -> tuple[int, tuple[str, ...]] | None:
        return (len(module.down_proj), STACKED_PARTS[parameter]) if parameter in STACKED_PARTS else None


class OneBelowAnother(ExpertForm):
    """Matrices of the experts one below the other, (experts * inner, hidden), in a module inside (DBRX)."""

    experts = InnerGatedExperts
    inner = ("mlp",)

    def matches(self, module: Any) -> bool:
        held = module._modules.get("mlp")
        if held is None or module._parameters or not hasattr(held, "activation_fn"):
            return False
        tensors, count = dict(held.named_parameters()), getattr(module, "num_experts", None)
        if tensors.keys() != {"w1", "v1", "w2"} or any(True for _ in held.buffers()):
            return False
        if not isinstance(count, int) or count < 1:
            return False
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        (shape,) = shapes if len(shapes) == 1 else ((),)
        return len(shape) == 2 and shape[0] % count == 0

    def parts(self, module: Any) -> dict[str, nn.Linear]:
        held, count = module.mlp, self.choices(module)
        gate, up, down = (tensor.unflatten(0, (count, -1)) for tensor in (held.w1, held.v1, held.w2))
        found: dict[str, nn.Linear] = {}
        for e in range(count):
            found |= {f"{e}.gate_proj": _view(gate[e], None), f"{e}.up_proj": _view(up[e], None)}
            found[f"{e}.down_proj"] = _view(down[e].T, None)
        return found

    def choices(self, module: Any) -> int:
        return module.num_experts

    def arguments(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        weight = module.mlp.w1
        x = torch.randn(2, 4, weight.shape[1], generator=generator)
        return _routed(x, self.choices(module), weight, generator)


class EveryToken(ExpertForm):
    """Transposed stacks that get every token once for each expert (Llama 4)."""

    experts = EveryTokenExperts

    def matches(self, module: Any) -> bool:
        if set(module._parameters) != {"gate_up_proj", "down_proj"} or hasattr(module, _FLAGS[0]):
            return False
        if not hasattr(module, "act_fn") or not _are_stacks(module, "gate_up_proj", "down_proj"):
            return False
        (_, hidden, both), (_, inner, out) = module.gate_up_proj.shape, module.down_proj.shape
        return hidden == out and both == 2 * inner

    def parts(self, module: Any) -> dict[str, nn.Linear]:
        return _gated(module.gate_up_proj.mT, module.down_proj.mT)

    def choices(self, module: Any) -> int:
        return len(module.down_proj)

    def arguments(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        weight = module.down_proj
        x = torch.randn(self.choices(module), 4, weight.shape[2], generator=generator)
        x[torch.rand(x.shape[:2], generator=generator) < 0.5] = 0
        return (x.flatten(0, 1).to(weight),)


class SortedRows(ExpertForm):
    """One matrix an expert, in one stack, whose rows come in the order of their experts (JetMoe)."""

    experts = SortedExperts

    def matches(self, module: Any) -> bool:
        sizes = ("num_experts", "input_size", "output_size")
        if set(module._parameters) != {"weight"} or not all(hasattr(module, size) for size in sizes):
            return False
        return tuple(module.weight.shape) == (module.num_experts, module.output_size, module.input_size)

    def parts(self, module: Any) -> dict[str, nn.Linear]:
        return {f"{e}.linear": _view(weight, None) for e, weight in enumerate(module.weight)}

    def choices(self, module: Any) -> int:
        return module.num_experts

    def arguments(self, module: Any, generator: torch.Generator) -> tuple[Any, ...]:
        counts = torch.randint(3, (module.num_experts,), generator=generator).tolist()
        return torch.randn(sum(counts), module.input_size, generator=generator).to(module.weight), counts


FORMS: tuple[Form, ...] = (
    Transposed(),
    Routed(),
    RoutedOutside(),
    EveryToken(),
    SortedRows(),
    OneBelowAnother(),
)


def _routed(x: Tensor, count: int, like: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and for each token two of ``count`` experts and their weights."""
    tokens = prod(x.shape[:-1])
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(tokens)]).to(like.device)
    return x.to(like), chosen, torch.rand(chosen.shape, generator=generator).to(like)


def _are_stacks(module: Any, *names: str) -> bool:
    weights = [module._parameters.get(name) for name in names]
    found = [weight for weight in weights if isinstance(weight, Tensor) and weight.ndim == 3]
    return len(found) == len(names) and len({len(weight) for weight in found}) == 1


def _gated(gate_up: Tensor, down: Tensor) -> dict[str, nn.Linear]:
    """Of as many experts as ``down`` (experts, out, in) has; gate and up lie one after the other in ``gate_up``."""
    found: dict[str, nn.Linear] = {}
    for e, weight in enumerate(down):
        found |= _halves(f"{e}.", gate_up[e], None, True)
        found[f"{e}.down_proj"] = _view(weight, None)
    return found


def _halves(prefix: str, weight: Tensor, bias: Tensor | None, is_concatenated: bool) -> Mapping[str, nn.Linear]:
    """Gate and up of one matrix, one after the other or in turns."""
    half = len(weight) // 2
    rows = (slice(half), slice(half, None)) if is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    return {
        f"{prefix}{name}": _view(weight[part], None if bias is None else bias[part])
        for name, part in zip(("gate_proj", "up_proj"), rows, strict=True)
    }


def _view(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear over tensors, weight (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
