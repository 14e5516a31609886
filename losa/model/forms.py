"""Linears that a model holds in another form than ``nn.Linear``: transposed, or as stacks of experts.

A model keeps its own form on disk and wherever losa neither trains nor packs it. ``views`` shows the linears that a
module stands for, and ``places`` where their weights lie in its tensors. ``losa.model.replacing`` puts modules in its
place that call them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.model.form_kinds import FORMS, ExpertForm, Form
from losa.modules.masked_lora import MaskedLoRALinear


@dataclass(frozen=True)
class Place:
    """Where a linear's weight (out, in) or bias (out,) lies in a contiguous tensor of another shape, as
    ``torch.as_strided`` takes it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """A view of a contiguous tensor."""
        return tensor.as_strided(self.shape, self.stride, int(tensor.storage_offset()) + self.offset)


def views(module: Any) -> dict[str, nn.Linear]:
    """The linears that a module of another form stands for, by name within it; a transposed linear's name is empty.
    Their weights are views of the module's parameters, and ``holder_of`` gives the module; of one that is held in
    shards they are on meta. Empty for other modules."""
    form = form_of(module)
    shown = module
    sharded = next((t for t in tensors_of(module).values() if isinstance(t, DTensor)), None)
    if sharded is not None:
        shown = empty_like(module, torch.empty(0, dtype=sharded.dtype, device="meta"), None)
    found = {} if form is None else form.parts(shown)
    for linear in found.values():
        vars(linear)["holder"] = module
        linear.training = module.training
    return found


def places(module: Any) -> dict[str, dict[str, Place]]:
    """Of each parameter of a module, by its name: where the weights and biases of ``views`` lie in it, by
    "LINEAR.weight" and "LINEAR.bias", or these words alone for a transposed linear. Empty for other modules."""
    if not has_views(module):
        return {}
    # Parameters of a loaded model may lie in one storage, those of this one have storages of their own.
    like = empty_like(module, torch.empty(0, device="meta"), None)
    names = {p.untyped_storage()._cdata: name for name, p in tensors_of(like).items()}
    found: dict[str, dict[str, Place]] = {}
    for part, linear in views(like).items():
        for kind, tensor in linear.named_parameters():
            place = Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
            found.setdefault(names[tensor.untyped_storage()._cdata], {})[f"{part}.{kind}".lstrip(".")] = place
    return found


def tensors_of(module: Any) -> dict[str, nn.Parameter]:
    """The parameters that ``views`` are of, by name within the module; none of another module."""
    form = form_of(module)
    return {} if form is None else form.tensors(module)


def choices_of_form(module: Any) -> int | None:
    """Among how many experts of a module a token chooses; None: it holds no experts in a form of their own."""
    form = form_of(module)
    return form.choices(module) if isinstance(form, ExpertForm) else None


def rows_of(module: Any, parameter: str) -> tuple[int, tuple[str, ...]] | None:
    """``ExpertForm.rows`` of a module that ``views`` shows as linears; None of another one."""
    form = form_of(module)
    return form.rows(module, parameter) if isinstance(form, ExpertForm) else None


def has_views(module: Any) -> bool:
    """Whether ``views`` shows any linear; it makes none."""
    return form_of(module) is not None


def holder_of(linear: nn.Module) -> nn.Module:
    """The module whose parameters a linear's are: itself, or what ``views`` was asked of."""
    return vars(linear).get("holder", linear)


def weight_count(module: Any) -> int:
    """Weights of the linears that ``views`` shows."""
    return sum(weights_of(module).values())


def weights_of(module: Any) -> dict[str, int]:
    """How many of them lie in each parameter, by its name within the module."""
    form = form_of(module)
    return {} if form is None else form.weights(module)


def form_of(module: Any) -> Form | None:
    """The form of a module that holds linears in another one than ``nn.Linear``; None of other modules."""
    if isinstance(module, (nn.Linear, nn.ModuleList, MaskedLoRALinear)):
        return None
    form = next((form for form in FORMS if form.matches(module)), None)
    if form is None:
        return None
    # What is inside would leave the model with the module: an activation with weights.
    others = [child for name, child in module.named_children() if name not in form.inner]
    inside = (tensor for child in others for tensor in (*child.parameters(), *child.buffers()))
    return form if next(inside, None) is None else None


def empty_like(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """A module like ``module`` with parameters of its own, of the types and in the place of a linear's. It shares all
    else. Weights that are no linear's, which nothing reads, are zeros."""
    form = form_of(module)
    assert form is not None
    new, counts = _shallow(module), form.weights(module)
    for name in form.inner:
        new._modules[name] = _shallow(new._modules[name])
    for name, parameter in form.tensors(module).items():
        like = weight if bias is None or not name.endswith("bias") else bias
        made = torch.empty if name not in counts or counts[name] == parameter.numel() else torch.zeros
        where, _, leaf = name.rpartition(".")
        tensor = made(parameter.shape, dtype=like.dtype, device=like.device)
        new.get_submodule(where)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return new


def _shallow(module: Any) -> Any:
    new = copy.copy(module)
    new.__dict__ |= {kind: dict(getattr(module, kind)) for kind in ("_parameters", "_buffers", "_modules")}
    return new
