"""Linears that a model holds in another form than ``nn.Linear``: transposed, or as stacks of experts.

A model keeps its own form on disk and wherever losa neither trains nor packs it. ``views`` shows the linears that a
module stands for, and ``places`` where their weights lie in its tensors. ``as_linears`` puts modules in its place that
call them, so that they can be wrapped or packed, and ``as_they_were`` puts the form back, with what the linears are
then.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.distributed.sharding import gathered, shard_module, sharding_of
from losa.model.form_kinds import FORMS, ExpertForm, Form
from losa.modules.linear_experts import stack_of, stand_for
from losa.modules.masked_lora import MaskedLoRALinear

logger = logging.getLogger("losa")

_FORMS = "_losa_forms"  # of a model: modules that as_linears has replaced, by name
_COMPARED: dict[tuple, bool] = {}


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
    form = _form_of(module)
    shown = module
    sharded = next((t for t in tensors_of(module).values() if isinstance(t, DTensor)), None)
    if sharded is not None:
        shown = _empty_like(module, torch.empty(0, dtype=sharded.dtype, device="meta"), None)
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
    like = _empty_like(module, torch.empty(0, device="meta"), None)
    names = {p.untyped_storage()._cdata: name for name, p in tensors_of(like).items()}
    found: dict[str, dict[str, Place]] = {}
    for part, linear in views(like).items():
        for kind, tensor in linear.named_parameters():
            place = Place(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
            found.setdefault(names[tensor.untyped_storage()._cdata], {})[f"{part}.{kind}".lstrip(".")] = place
    return found


def tensors_of(module: Any) -> dict[str, nn.Parameter]:
    """The parameters that ``views`` are of, by name within the module; none of another module."""
    form = _form_of(module)
    return {} if form is None else form.tensors(module)


def choices_of_form(module: Any) -> int | None:
    """Among how many experts of a module a token chooses; None: it holds no experts in a form of their own."""
    form = _form_of(module)
    return form.choices(module) if isinstance(form, ExpertForm) else None


def rows_of(module: Any, parameter: str) -> tuple[int, tuple[str, ...]] | None:
    """``ExpertForm.rows`` of a module that ``views`` shows as linears; None of another one."""
    form = _form_of(module)
    return form.rows(module, parameter) if isinstance(form, ExpertForm) else None


def has_views(module: Any) -> bool:
    """Whether ``views`` shows any linear; it makes none."""
    return _form_of(module) is not None


def computes_its_linears(module: Any) -> bool:
    """Whether the linears of a module on meta compute what it does, tried with random weights: once for each class and
    size. Matrices of a stack overlap in memory, which is that of two of them."""
    form = _form_of(module)
    if not isinstance(form, ExpertForm):
        return form is not None
    shapes = tuple((name, tuple(p.shape)) for name, p in form.tensors(module).items())
    # A limit of an activation, or the like.
    numbers = tuple((name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
    key = (type(module), type(module).forward, shapes, numbers)
    if key not in _COMPARED:
        like: Any = _empty_like(module, torch.empty(0, device="meta"), None)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in form.tensors(like).items():
            where, _, leaf = name.rpartition(".")
            values = nn.Parameter(_random(parameter.shape, generator), requires_grad=False)
            like.get_submodule(where)._parameters[leaf] = values
        _COMPARED[key] = _computes_the_same(form.experts(like, views(like)), like, form)
    return _COMPARED[key]


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of a stack each matrix begins a few numbers, which are aligned as kernels want them, after the one before it."""
    step = 64
    matrix = math.prod(shape[1:])
    overlaps = len(shape) == 3 and matrix > step
    stride = (step, shape[2], 1) if overlaps else torch.empty(shape, device="meta").stride()
    count = step * (shape[0] - 1) + matrix if overlaps else shape.numel()
    return (0.05 * torch.randn(count, generator=generator)).as_strided(shape, stride)


def holder_of(linear: nn.Module) -> nn.Module:
    """The module whose parameters a linear's are: itself, or what ``views`` was asked of."""
    return vars(linear).get("holder", linear)


def weight_count(module: Any) -> int:
    """Weights of the linears that ``views`` shows."""
    return sum(weights_of(module).values())


def weights_of(module: Any) -> dict[str, int]:
    """How many of them lie in each parameter, by its name within the module."""
    form = _form_of(module)
    return {} if form is None else form.weights(module)


def _form_of(module: Any) -> Form | None:
    if isinstance(module, (nn.Linear, nn.ModuleList, MaskedLoRALinear)):
        return None
    form = next((form for form in FORMS if form.matches(module)), None)
    if form is None:
        return None
    # What is inside would leave the model with the module: an activation with weights.
    others = [child for name, child in module.named_children() if name not in form.inner]
    inside = (tensor for child in others for tensor in (*child.parameters(), *child.buffers()))
    return form if next(inside, None) is None else None


def as_linears(
    model: nn.Module, names: Iterable[str], made: Callable[[str, nn.Linear], nn.Module] | None = None
) -> list[str]:
    """Replace modules of other forms, in place, by linears and ``LinearExperts``. Processes that hold a module in
    shards call this together, and hold what takes its place in shards too.

    Args:
        model: whose modules they are.
        names: of modules that ``views`` shows as linears.
        made: (name in the model, linear) -> the layer that is put there, of a linear whose weight lies in memory as
            kernels read it; None: a linear with memory of its own, to be packed, and ``unpacked_as_they_were`` puts
            the form back.

    Returns:
        names of stacks whose linears do not compute what they do, which stay.
    """
    forms: dict[str, nn.Module] = vars(model).setdefault(_FORMS, {}) if made is not None else {}
    left = []
    for name in names:
        module, linears = model.get_submodule(name), cast(dict[str, nn.Module], {})
        sharding = sharding_of(module)
        with gathered(module):
            copied = True
            for part, view in views(module).items():
                copied &= sharding is not None or made is None or not view.weight.is_contiguous()
                linear = _contiguous(view, always=made is None)
                linears[part] = linear if made is None else made(f"{name}.{part}".rstrip("."), linear)
            # What was copied need not stay in memory twice.
            held = _empty_like(module, torch.empty(0, device="meta"), None) if copied else module
            form, new = _form_of(module), linears.get("")
            if isinstance(form, ExpertForm):
                new = form.experts(held, linears).train(module.training)
                if not _computes_the_same(new, module, form):
                    left.append(name)
                    continue
            assert new is not None, "a form without experts is one linear"
            if sharding is not None:
                shard_module(new, sharding)
        if made is None:
            stand_for(new, held)
        forms[name] = held
        model.set_submodule(name, new)
    return left


def replaced_forms(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of other forms whose place wrapped linears have taken, by name."""
    return vars(model).get(_FORMS, {})


def as_they_were(model: nn.Module, made: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
    """Put the forms back that ``as_linears`` replaced, in place and frozen: one after the other, with new parameters
    where a linear has another weight than it had, or is held in shards. Processes that share a model call this
    together.

    Args:
        model: whose modules they are.
        made: a layer -> the plain linear that it becomes.
    """
    forms = replaced_forms(model)
    for name in list(forms):
        model.set_submodule(name, _restored(model.get_submodule(name), forms.pop(name), made))
    vars(model).pop(_FORMS, None)


def unpacked_as_they_were(model: nn.Module) -> None:
    """Put the forms back that linears took the place of to be packed, in place and frozen, where all of a form's
    linears are plain. Those of a wrapped model are left to ``as_they_were``."""
    wrapped = replaced_forms(model)
    for name, now in list(model.named_modules()):
        stack = stack_of(now)
        if stack is None or name in wrapped:
            continue
        if all(type(now.get_submodule(part)) is nn.Linear for part in views(stack)):
            model.set_submodule(name, _restored(now, stack, lambda linear: linear))


def _restored(now: nn.Module, form: nn.Module, made: Callable[[nn.Module], nn.Module]) -> nn.Module:
    parts = {part: _taken(now, part) for part in views(form)}
    try:
        return _put_back(form, parts, made).requires_grad_(False).train(now.training)
    except BaseException:
        for part, linear in parts.items():  # memory ran out
            if part:
                now.set_submodule(part, linear)
        raise


def _taken(module: nn.Module, part: str) -> nn.Module:
    """A linear that takes another form's place, or is in a module that does: it leaves that module, so that it is freed
    when it was copied."""
    if not part:
        return module
    where, _, name = part.rpartition(".")
    linear = module.get_submodule(part)
    del module.get_submodule(where)._modules[name]
    return linear


def _put_back(module: nn.Module, parts: dict[str, nn.Module], made: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """``module``; or where a linear has another weight than ``module`` has, a module like it with the weights and
    biases of ``made`` of ``parts``, which are used up."""
    before = views(module)
    new: nn.Module | None = None
    after: dict[str, nn.Linear] = {}
    sharding = None
    for part, view in before.items():
        sharding = sharding or sharding_of(parts[part])
        with gathered(parts[part]):
            linear: Any = made(parts[part])
            if new is None:
                if _is_same(view.weight, linear.weight):
                    del parts[part]
                    continue
                new = _empty_like(module, linear.weight, linear.bias)
                after = views(new)
                for earlier in before:
                    if earlier == part:
                        break
                    _copy(before[earlier], after[earlier])
            _copy(linear, after[part])
            del parts[part]
    if new is None:
        return module
    if sharding is not None:
        shard_module(new, sharding)
    return new


def _copy(source: Any, target: Any) -> None:
    target.weight.data.copy_(source.weight)
    if target.bias is not None:
        target.bias.data.copy_(source.bias)


def _is_same(one: Tensor, other: Any) -> bool:
    return not one.is_meta and one.data_ptr() == other.data_ptr()


def _empty_like(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """A module like ``module`` with parameters of its own, of the types and in the place of a linear's. It shares all
    else. Weights that are no linear's, which nothing reads, are zeros."""
    form = _form_of(module)
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


def restore_tensors(stack: Any, name: str, tensors: dict[str, Tensor]) -> None:
    """In a state dict, put the tensors of another form in the place of its linears', which are dense.

    Args:
        stack: of that form.
        name: in the model, of the module that took its place.
        tensors: the state dict.
    """
    named = {part: f"{name}.{part}".rstrip(".") for part in views(stack)}
    weights = {part: tensors.pop(f"{full}.weight") for part, full in named.items()}
    biases = {part: tensors.pop(f"{full}.bias", None) for part, full in named.items()}
    first = next(iter(named))
    new = _empty_like(stack, weights[first], biases[first])
    for part, view in views(new).items():
        view.weight.data.copy_(weights.pop(part))
        if (bias := biases[part]) is not None:
            view.bias.data.copy_(bias)
    tensors |= {f"{name}.{key}": value for key, value in tensors_of(new).items()}


def _contiguous(view: nn.Linear, always: bool) -> nn.Linear:
    """The linear of its own that a view becomes; a transposed weight is copied, or with ``always`` any."""
    vars(view).pop("holder")
    weight = view.weight.data
    view.weight.data = weight.clone(memory_format=torch.contiguous_format) if always else weight.contiguous()
    if always and view.bias is not None:
        view.bias.data = view.bias.data.clone()
    return view


@torch.no_grad()
def _computes_the_same(experts: nn.Module, stack: Any, form: ExpertForm) -> bool:
    """Whether the linears of a stack compute what it does, for a few random tokens; without numbers they do."""
    weight = next(iter(stack.parameters()))
    if weight.is_meta:
        return True
    hidden, *others = form.arguments(stack, torch.Generator().manual_seed(0))
    # Large values reach what an activation does with them.
    for arguments in ((hidden, *others), (16 * hidden, *others)):
        try:
            found, expected = experts(*arguments), stack(*arguments)
        except Exception as error:  # someone else's code
            logger.info("experts of %s are left stacked: %s", type(stack).__name__, error)
            return False
        bound = 16 * torch.finfo(weight.dtype).eps * expected.abs().amax(-1, keepdim=True)
        if found.shape != expected.shape or not bool(((found - expected).abs() <= bound).all()):
            logger.info("experts of %s are left stacked: their linears compute something else", type(stack).__name__)
            return False
    return True
