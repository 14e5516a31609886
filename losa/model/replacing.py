"""Linears in the place of the other forms in which a model holds them (``losa.model.forms``), and back.

``as_linears`` puts modules in the place of a form that call its linears, so that they can be wrapped or packed, and
``as_they_were`` puts the form back, with what the linears are then. A stack of experts is replaced only where its
linears give what it gives.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from losa.distributed.sharding import gathered, shard_module, sharding_of
from losa.distributed.together import together
from losa.distributed.watch import progress
from losa.errors import LosaError, ModelError
from losa.model.form_kinds import ExpertForm
from losa.model.forms import empty_like, form_of, tensors_of, views
from losa.modules.linear_experts import stack_of, stand_for

logger = logging.getLogger("losa")

_FORMS = "_losa_forms"  # of a model: modules that as_linears has replaced, by name
_COMPARED: dict[tuple, bool] = {}


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

    Raises:
        ModelError: of shards, in all processes: the linears compute it in some of them alone.
        LosaError: of shards, in all processes: one of them failed. What was replaced before stays replaced.
    """
    forms: dict[str, nn.Module] = vars(model).setdefault(_FORMS, {}) if made is not None else {}
    left = []
    for name in names:
        progress(f"replacing {name}")
        found = _replacement(model.get_submodule(name), name, made)
        if found is None:
            left.append(name)
            continue
        new, held = found
        if made is None:
            stand_for(new, held)
        forms[name] = held
        model.set_submodule(name, new)
    return left


def _replacement(
    module: nn.Module, name: str, made: Callable[[str, nn.Linear], nn.Module] | None
) -> tuple[nn.Module, nn.Module] | None:
    """What takes a module's place, and the module itself, without weights where others hold all of them; None where its
    linears compute something else."""
    sharding, built = sharding_of(module), cast(list[tuple[nn.Module, nn.Module]], [])

    def build() -> bool:
        linears: dict[str, nn.Module] = {}
        copied = True
        for part, view in views(module).items():
            copied &= sharding is not None or made is None or not view.weight.is_contiguous()
            linear = _contiguous(view, always=made is None)
            linears[part] = linear if made is None else made(f"{name}.{part}".rstrip("."), linear)
        # What was copied need not stay in memory twice.
        held = empty_like(module, torch.empty(0, device="meta"), None) if copied else module
        form = form_of(module)
        new = form.experts(held, linears).train(module.training) if isinstance(form, ExpertForm) else linears[""]
        built.append((new, held))
        return not isinstance(form, ExpertForm) or _computes_the_same(new, module, form)

    with gathered(module):
        # Memory may run out in one process alone, and GPUs of two kinds round differently.
        try:
            alike = [build()] if sharding is None else together(build)
        except Exception as error:
            if sharding is None or isinstance(error, LosaError):
                raise
            # The other processes raise one too, and all go on alike.
            raise LosaError(f"{name}: {type(error).__name__}: {error}") from error
        if any(alike) and not all(alike):
            raise ModelError(f"{name}: its linears compute what it does in {sum(alike)} of {len(alike)} processes")
        if sharding is not None and alike[0]:
            shard_module(built[0][0], sharding)
    return built[0] if alike[0] else None


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
        progress(f"putting {name} together")
        model.set_submodule(name, _restored(model.get_submodule(name), forms[name], made))
        del forms[name]
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
                new = empty_like(module, linear.weight, linear.bias)
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
        shard_module(new, sharding, pin=False)
    return new


def _copy(source: Any, target: Any) -> None:
    target.weight.data.copy_(source.weight)
    if target.bias is not None:
        target.bias.data.copy_(source.bias)


def _is_same(one: Tensor, other: Any) -> bool:
    return not one.is_meta and one.data_ptr() == other.data_ptr()


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
    new = empty_like(stack, weights[first], biases[first])
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


def computes_its_linears(module: Any) -> bool:
    """Whether the linears of a module on meta compute what it does, tried with random weights: once for each class and
    size. Matrices of a stack overlap in memory, which is that of two of them."""
    form = form_of(module)
    if not isinstance(form, ExpertForm):
        return form is not None
    shapes = tuple((name, tuple(p.shape)) for name, p in form.tensors(module).items())
    # A limit of an activation, or the like.
    numbers = tuple((name, value) for name, value in vars(module).items() if isinstance(value, (bool, int, float, str)))
    key = (type(module), type(module).forward, shapes, numbers)
    if key not in _COMPARED:
        like: Any = empty_like(module, torch.empty(0, device="meta"), None)
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
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # someone else's code
            logger.info("experts of %s are left stacked: %s", type(stack).__name__, error)
            return False
        bound = 16 * torch.finfo(weight.dtype).eps * expected.abs().amax(-1, keepdim=True)
        if found.shape != expected.shape or not bool(((found - expected).abs() <= bound).all()):
            logger.info("experts of %s are left stacked: their linears compute something else", type(stack).__name__)
            return False
    return True
