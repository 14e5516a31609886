"""Linears that a model holds in another form than ``nn.Linear``: transposed, or as stacks of experts.

A model keeps its own form on disk and wherever losa does not train it. ``views`` shows the linears that a module stands
for. ``as_linears`` puts modules in its place that call them, so that they can be wrapped, and ``as_they_were`` puts the
form back, with what the linears are then.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.modules.linear_experts import LinearExperts

logger = logging.getLogger("losa")

# What transformers.integrations.moe.use_experts_implementation says of every module of a class.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel")
_FORMS = "_losa_forms"  # of a model: modules that as_linears has replaced, by name


def views(module: Any) -> dict[str, nn.Linear]:
    """The linears that a module of another form stands for, by name within it; a transposed linear's name is empty.
    Their weights are views of the module's parameters, and ``holder_of`` gives the module. Empty for other modules, and
    for one that is held in shards."""
    if any(isinstance(parameter, DTensor) for parameter in module._parameters.values()):
        return {}
    if _is_transposed(module):
        found = {"": _view(module.weight.T, module.bias)}
    elif _is_stack(module):
        found = {f"{e}.{name}": linear for e in range(len(module.down_proj)) for name, linear in _expert(module, e)}
    else:
        return {}
    for linear in found.values():
        vars(linear)["holder"] = module
    return found


def holder_of(linear: nn.Module) -> nn.Module:
    """The module whose parameters a linear's are: itself, or what ``views`` was asked of."""
    return vars(linear).get("holder", linear)


def as_linears(model: nn.Module, prefix: str, only: Set[str] | None = None) -> None:
    """Replace the modules of other forms below ``prefix``, in place, by linears and ``LinearExperts``. Weights that lie
    in memory as a linear's do stay where they are; others are copied. A stack whose linears do not compute what it does
    stays. ``only``: names of modules; None: all."""
    forms: dict[str, nn.Module] = vars(model).setdefault(_FORMS, {})
    trusted: dict[type, bool] = {}
    for name, module in list(model.get_submodule(prefix).named_modules(prefix=prefix)):
        if only is not None and name not in only:
            continue
        linears = {part: _contiguous(linear) for part, linear in views(module).items()}
        if not linears:
            continue
        if "" in linears:
            new: nn.Module = linears[""]
        else:
            new = LinearExperts(module, _by_expert(linears)).train(module.training)
            if not trusted.setdefault(type(module), _computes_the_same(new, module)):
                continue
        forms[name] = module
        model.set_submodule(name, new)


def as_they_were(model: nn.Module) -> None:
    """Put the forms back that ``as_linears`` replaced, in place: with new parameters where a linear has another weight
    than it had. The linears are plain."""
    forms: dict[str, nn.Module] = vars(model).pop(_FORMS, {})
    for name, module in forms.items():
        now = model.get_submodule(name)
        linears = {"": now} if "" in views(module) else dict(_experts_linears(now))
        model.set_submodule(name, _rebuilt(module, linears))


def _rebuilt(module: nn.Module, linears: dict[str, Any]) -> nn.Module:
    """A module like ``module``, whose ``views`` have the weights and biases of ``linears``, which are used up. They
    share all else."""
    before = views(module)
    if all(linears[part].weight.data_ptr() == view.weight.data_ptr() for part, view in before.items()):
        return module
    first = next(iter(linears.values()))
    new = _empty_like(module, first.weight, first.bias)
    for part, view in views(new).items():
        linear = linears.pop(part)
        view.weight.data.copy_(linear.weight)
        if view.bias is not None:
            view.bias.data.copy_(linear.bias)
    return new


def _empty_like(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """A module like ``module`` with parameters of its own, of the types and in the place of a linear's. It shares all
    else."""
    new: Any = copy.copy(module)
    new.__dict__ |= {kind: dict(getattr(module, kind)) for kind in ("_parameters", "_buffers", "_modules")}
    for name, parameter in module.named_parameters(recurse=False):
        like = weight if bias is None or not name.endswith("bias") else bias
        empty = torch.empty_like(parameter, dtype=like.dtype, device=like.device)
        new._parameters[name] = nn.Parameter(empty, requires_grad=False)
    return new


def stack_experts(experts: LinearExperts, name: str, tensors: dict[str, Tensor]) -> None:
    """In a state dict, put the stack's tensors in the place of its linears', which are dense.

    Args:
        experts: whose linears they are.
        name: of ``experts`` in the model.
        tensors: the state dict.
    """
    stack: Any = vars(experts)["stack"]
    weights = {part: tensors.pop(f"{name}.{part}.weight") for part in views(stack)}
    biases = {part: tensors.pop(f"{name}.{part}.bias", None) for part in weights}
    new = _empty_like(stack, next(iter(weights.values())), next(iter(biases.values())))
    for part, view in views(new).items():
        view.weight.data.copy_(weights.pop(part))
        if (bias := biases[part]) is not None:
            view.bias.data.copy_(bias)
    tensors |= {f"{name}.{key}": value for key, value in new._parameters.items()}


def _is_transposed(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_stack(module: Any) -> bool:
    """Whether a module holds experts as ``LinearExperts`` reads them: all of them in this process, and no norm."""
    if not all(hasattr(module, flag) for flag in _FLAGS) or module._is_expert_parallel or module.has_post_expert_norm:
        return False
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    weights = [module._parameters.get(name) for name in names]
    found = [weight for weight in weights if isinstance(weight, Tensor) and weight.ndim == 3]
    return len(found) == 2 and found[0].shape[0] == found[1].shape[0]


def _expert(stack: Any, e: int) -> list[tuple[str, nn.Linear]]:
    """The linears of one expert of a stack, by name."""

    def linear(name: str, rows: slice) -> nn.Linear:
        weight = getattr(stack, name)[e]
        bias = getattr(stack, f"{name}_bias")[e][rows] if stack.has_bias else None
        return _view((weight.T if stack.is_transposed else weight)[rows], bias)

    found = [("down_proj", linear("down_proj", slice(None)))]
    if not stack.has_gate:
        return [("up_proj", linear("up_proj", slice(None))), *found]
    half = stack.gate_up_proj.shape[2 if stack.is_transposed else 1] // 2
    gate, up = (slice(half), slice(half, None)) if stack.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    return [("gate_proj", linear("gate_up_proj", gate)), ("up_proj", linear("gate_up_proj", up)), *found]


def _view(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear over tensors, weight (out, in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _contiguous(linear: nn.Linear) -> nn.Linear:
    """Kernels read rows."""
    vars(linear).pop("holder")
    if not linear.weight.is_contiguous():
        linear.weight.data = linear.weight.data.contiguous()
    return linear


def _by_expert(linears: dict[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    found: list[dict[str, nn.Linear]] = []
    for part, linear in linears.items():
        number, _, name = part.partition(".")
        if int(number) == len(found):
            found.append({})
        found[-1][name] = linear
    return found


def _experts_linears(experts: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{e}.{name}", linear) for e, expert in experts.named_children() for name, linear in expert.named_children()
    ]


@torch.no_grad()
def _computes_the_same(experts: nn.Module, stack: Any) -> bool:
    """Whether the linears of a stack compute what it does, for a few random tokens; without numbers they do."""
    weight = stack.down_proj
    if weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    count, hidden = len(weight), weight.shape[2 if stack.is_transposed else 1]
    x = torch.randn(8, hidden, generator=generator).to(weight)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in x]).to(weight.device)
    shares = torch.rand(chosen.shape, generator=generator).to(weight)
    try:
        found, expected = experts(x, chosen, shares), stack(x, chosen, shares)
    except Exception as error:  # someone else's code
        logger.info("experts of %s are left stacked: %s", type(stack).__name__, error)
        return False
    bound = 16 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    same = bool((found - expected).abs().max() <= bound)
    if not same:
        logger.info("experts of %s are left stacked: their linears compute something else", type(stack).__name__)
    return same
