"""A decoder's blocks and the linears in them, found in any Hugging Face model.

Structure is discovered from the modules themselves; no model's name appears here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa.errors import ModelError
from losa.model import forms
from losa.model.forms import holder_of, views
from losa.modules.linear_experts import stack_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear

Targets = list[str] | str | None
"""Which linears of a block; see ``find_linears``."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The decoder blocks of ``model``, in order: ``modules``, a list whose name in the model is ``prefix``.

    ``len`` counts the blocks, iteration gives the blocks.
    """

    prefix: str
    modules: nn.ModuleList
    model: nn.Module

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    @property
    def names(self) -> list[str]:
        """Each block's name in the model."""
        return [f"{self.prefix}.{index}" for index in range(len(self))]

    def index_of(self, name: str) -> int | None:
        """The number of a block in a tensor's name in the model, which may be beyond the last block; None: the tensor
        belongs to no block."""
        number = name.removeprefix(f"{self.prefix}.").partition(".")[0] if name.startswith(f"{self.prefix}.") else ""
        return int(number) if re.fullmatch(r"\d{1,9}", number, re.ASCII) else None

    def linears(self, targets: Targets = None) -> dict[str, nn.Module]:
        """The prunable linears of all blocks, in model order, by their names in the model; see ``find_linears``."""
        uses, wanted = parameter_uses(self.model), as_targets(targets)
        return {
            f"{block_name}.{name}": linear
            for block_name, block in zip(self.names, self, strict=True)
            for name, linear in linears_of(block, uses, wanted).items()
        }

    def holders(self) -> dict[str, nn.Module]:
        """The modules that hold the parameters of ``linears``, by their names in the model: the linears themselves, or
        modules of another form."""
        wanted = {holder_of(linear) for linear in self.linears().values()}
        return {name: m for name, m in self.modules.named_modules(prefix=self.prefix) if m in wanted}


def find_blocks(model: nn.Module) -> Blocks:
    """The decoder's repeated blocks: the ``nn.ModuleList`` that holds the most linear weights. Its blocks may be of
    several classes, as where attention takes turns with a state-space model.

    Raises:
        ModelError: an encoder-decoder; no such list; or a second list at least half as large. Says what was seen.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError("model: expected a decoder-only language model, got an encoder-decoder")
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    # A list inside another list (experts of a block) is part of a block.
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    # A model of several modalities has blocks of images as well.
    decoder = set(_decoder_of(model).modules())
    lists = {n: m for n, m in lists.items() if m in decoder} or lists
    sizes = {n: sum(weight_count(x) for x in m.modules()) for n, m in lists.items()}
    ranked = sorted((n for n in lists if sizes[n]), key=lambda n: -sizes[n])
    seen = "; ".join(_describe(n, blocks, sizes[n]) for n, blocks in lists.items()) or "no nn.ModuleList at all"
    if not ranked:
        raise ModelError(f"model: found no repeated blocks with nn.Linear layers; saw {seen}")
    if len(ranked) > 1 and 2 * sizes[ranked[1]] >= sizes[ranked[0]]:
        raise ModelError(f"model: cannot tell which list holds the decoder's blocks; saw {seen}")
    best = lists[ranked[0]]
    empty = sorted({type(block).__name__ for block in best if not any(weight_count(m) for m in block.modules())})
    if empty or any(is_linear(block) for block in best):
        what = f"blocks that hold linears, which {', '.join(empty)} does not" if empty else "blocks, not linears"
        raise ModelError(f"model: expected a list of {what}; saw {seen}")
    return Blocks(ranked[0], best, model)


def _decoder_of(model: Any) -> nn.Module:
    """The text decoder that a model of transformers names; the model itself where it names none."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not say
        return model
    return decoder if isinstance(decoder, nn.Module) else model


def _describe(name: str, blocks: nn.ModuleList, weights: int) -> str:
    kinds = Counter(type(block).__name__ for block in blocks)
    text = f"{name!r} ({', '.join(f'{count} x {kind}' for kind, count in kinds.items())}) with "
    if weights:
        return text + f"{weights} weights in nn.Linear"
    others = {type(m).__name__ for m in blocks.modules() for p in m.parameters(recurse=False) if p.ndim >= 2}
    return text + "no nn.Linear" + (f" (weights live in {', '.join(sorted(others))})" if others else "")


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | MaskedLoRALinear]:
    """Whether a layer computes x W^T + bias from ``weight``. A subclass of ``nn.Linear`` may compute something else
    (quantised ones do); so does the linear inside ``nn.MultiheadAttention``, whose forward is never called."""
    if isinstance(module, MaskedLoRALinear):
        return True
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) and _computes_linear(type(module))  # type: ignore[arg-type]


@cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether layers of a class compute what ``nn.Linear`` computes; one with a forward of its own is tried."""
    if kind.forward is nn.Linear.forward:
        return True
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.linspace(-2, 2, 15).view(5, 3)
        try:
            layer = kind(3, 2)
            found, expected = layer(x), F.linear(x, layer.weight, layer.bias)
        except Exception:  # someone else's code, made and called in a way that it may not expect
            return False
    near = isinstance(found, Tensor) and found.shape == expected.shape
    return near and bool((found - expected).abs().max() <= 8 * torch.finfo(x.dtype).eps * expected.abs().max())


def weight_count(module: nn.Module) -> int:
    """Weights of a linear, dense or packed, and of the linears that a module stands for; 0 for another module. Children
    do not count."""
    if isinstance(module, SparseLinear):
        return module.out_features * module.in_features
    if is_linear(module):
        return module.weight.numel()
    return forms.weight_count(module)


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The prunable linears of all decoder blocks, in model order, by their names in the model."""
    return find_blocks(model).linears()


def find_linears(block: nn.Module, targets: Targets = None, *, model: nn.Module | None = None) -> dict[str, nn.Module]:
    """The prunable linears of a block, ``nn.Linear`` or ``MaskedLoRALinear``, in model order, by name within it. What
    stands for linears in another form is shown as ``losa.model.forms.views`` shows it.

    Two kinds are left out: linears whose weight occurs twice within ``model`` (default: within the block), and routers
    of a mixture of experts (linears beside a collection of n experts that have n outputs, or one).

    Args:
        targets: names: a linear's last component ("q_proj") or a longer end of its name; or "re:<regex>", searched
            in the name; or a list of both. None takes all linears. They may match no linear of one block, since blocks
            can differ.

    Raises:
        ModelError: a regular expression that does not compile.
    """
    return linears_of(block, parameter_uses(model or block), as_targets(targets))


def linears_of(block: nn.Module, uses: Counter, targets: list[str]) -> dict[str, nn.Module]:
    """``find_linears``, with ``parameter_uses`` of the model and targets of ``as_targets``; no targets take all."""
    routers = _routers(block)
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        own = {"": module} if is_linear(module) else views(module)
        if module in routers or is_shared(module, uses):
            continue
        for part, linear in own.items():
            full = ".".join(filter(None, (name, part)))
            if not targets or any(matches(target, full) for target in targets):
                found[full] = linear
    return found


def is_shared(module: nn.Module, uses: Counter) -> bool:
    """Whether a matrix or stack of a module occurs more than once, by ``parameter_uses`` of the model."""
    weights = own_weights(module) or [weight for weight in forms.tensors_of(module).values() if weight.ndim > 1]
    return any(uses[id(weight)] > 1 for weight in weights)


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """A module's own matrices and stacks."""
    return [p for p in module._parameters.values() if p is not None and p.ndim > 1]


def parameter_uses(model: nn.Module) -> Counter:
    """How often each parameter occurs, by id. A parameter of a module with two names counts twice."""
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    return Counter(id(p) for module in modules for p in module._parameters.values() if p is not None)


def as_targets(targets: Targets) -> list[str]:
    """Targets as a list. Raises ModelError for a regular expression that does not compile."""
    targets = [targets] if isinstance(targets, str) else list(targets or [])
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise ModelError(f"targets: {target!r} is not a regular expression: {error}") from error
    return targets


def matches(target: str, name: str) -> bool:
    """Whether a target means the linear of that name within its block."""
    if target.startswith("re:"):
        return re.search(target[3:], name) is not None
    return f".{name}".endswith(f".{target}")


def stacked_weights(module: nn.Module) -> list[str]:
    """Names of a module's own stacked expert weights: Parameters (experts, ., .).

    A module of experts has no other parameters but biases (experts, .), and its children have none. A mixer whose heads
    have a matrix each differs in that.
    """
    own = dict(module.named_parameters(recurse=False))
    stacked = [name for name, p in own.items() if p.ndim == 3 and p.shape[0] > 1]
    if not stacked or isinstance(module, nn.modules.conv._ConvNd):
        return []
    inside = any(True for child in module.children() for _ in child.parameters())
    return [] if inside or any(p.ndim < 2 for p in own.values()) else stacked


def expert_lists(block: nn.Module) -> list[nn.ModuleList]:
    """A block's lists of experts, modules of one class with linears of their own: a token meets some of them."""
    return [m for m in expert_choices(block) if isinstance(m, nn.ModuleList)]


def expert_choices(block: nn.Module) -> dict[nn.Module, int]:
    """The modules that hold a block's experts, and among how many a token chooses there. They hold stacked weights, or
    experts in another form (``losa.model.forms``), or are lists of modules of one class: what takes the place of such
    a form, or has a router beside it, a matrix with a row for each of them."""
    found = {m: count for m in block.modules() if (count := _choices_of(m)) is not None}
    lists = [m for m in found if isinstance(m, nn.ModuleList) and stack_of(m) is None]
    for each in lists:
        inside = set(each.modules())
        beside = (m for m in block.modules() if m not in inside and not isinstance(m, MaskedLoRALinear))
        if not any(w.ndim == 2 and len(w) == found[each] for m in beside for w in own_weights(m)):
            del found[each]
    return found


def _choices_of(collection: nn.Module) -> int | None:
    if (choices := forms.choices_of_form(stack_of(collection) or collection)) is not None:
        return choices
    if fused := stacked_weights(collection):
        return getattr(collection, fused[0]).shape[0]
    if isinstance(collection, nn.ModuleList) and len(collection) > 1 and len({type(m) for m in collection}) == 1:
        inside = any(weight_count(m) for m in collection.modules())  # packed linears too
        return len(collection) if inside and not weight_count(collection[0]) else None
    return None


def _routers(block: nn.Module) -> set[nn.Module]:
    routers: set[nn.Module] = set()
    choices = expert_choices(block)
    for parent in block.modules() if choices else ():
        for collection in parent.children():
            count = choices.get(collection)
            if count is not None:
                beside = set(parent.modules()) - set(collection.modules())
                routers |= {m for m in beside if is_linear(m) and m.out_features in (1, count)}
    return routers
