"""A model filled from an open packed directory, block by block. Its dense weights never exist together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import ModelError, shown_name
from losa.model.finite import check_finite, check_rounded, is_finite, rounded
from losa.model.forms import Place
from losa.model.grouping import group_linears
from losa.model.naming import Naming, checked_naming
from losa.model.replacing import as_linears
from losa.model.saving import guard_saving
from losa.model.skeleton import empty_model
from losa.modules.linear_experts import stack_of, stand_for
from losa.modules.sparse import SparseLinear
from losa.packed.parts import Contents
from losa.packed.stacks import linears_inside
from losa_kernels.packing import Packed

logger = logging.getLogger("losa")


def load_weights(directory: Path, contents: Contents, device: torch.device) -> nn.Module:
    """The model of ``directory`` with the weights in ``contents``, packed linears as ``SparseLinear``, for inference.

    Raises:
        ModelError: tensors are missing, do not fit the model or are not finite; names the tensor.
    """
    kinds = [entry.dtype for entry in contents.stored.values() if entry.dtype.is_floating_point]
    model: Any = empty_model(directory, fallback=kinds[0] if kinds else torch.float32)
    naming = checked_naming(model, contents.stored, contents.where)
    forms = _Forms.of(naming, contents)
    as_linears(model, forms.modules)
    loaded = _fill(model, naming, contents, directory, device, forms)
    naming.warn_of_unused(directory)
    # As in transformers' own loading: a stored tensor is kept even where the config ties it to another.
    model.tie_weights(missing_keys=naming.expected.keys() - loaded, recompute_mapping=False)
    absent = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if absent:
        raise ModelError(f"{contents.where}: {len(absent)} tensors are missing: {', '.join(absent[:3])}")
    naming.remember()
    guard_saving(model)
    return model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class _Forms:
    """Modules of other forms (``losa.model.forms``) that are to be linears, and what fills them.

    modules: names in the model.
    experts: stored tensor -> the linear whose weight it is.
    inside: packed linear, by its name on disk -> the stored tensor of the dense checkpoint that it is part of, and the
        linear's name in the model.
    pieces: stored tensor -> names in the model of the tensors that it is cut into, and where they lie in it.
    """

    modules: set[str]
    experts: dict[str, str]
    inside: dict[str, tuple[str, str]]
    pieces: dict[str, dict[str, Place]]

    @classmethod
    def of(cls, naming: Naming, contents: Contents) -> _Forms:
        """Raises ModelError: a packed linear lies where the model has none."""
        experts, inside = naming.experts, linears_inside(naming.parts, contents.stacks, contents.where)
        packed = {f"{name}.weight" for name in contents.packed} & experts.keys()
        modules = {experts[name].rsplit(".", 2)[0] for name in packed}
        holders = {name: naming.holder(naming.renamed[name]) for name in naming.parts}
        modules |= {str(holders[name]) for name in contents.stacks}
        return cls(
            modules,
            {name: linear for name, linear in experts.items() if linear.rsplit(".", 2)[0] in modules},
            inside,
            {name: own for name, own in naming.parts.items() if holders[name] in modules},
        )


def _fill(
    model: nn.Module, naming: Naming, contents: Contents, directory: Path, device: torch.device, forms: _Forms
) -> set[str]:
    """Put all tensors into ``model``, part by part; the names in the model, as it is before ``as_linears``, that were
    filled."""
    blocks, targets, dtypes = naming.blocks, naming.targets(), naming.dtypes()
    # By name in the model: stored tensors that wait for others to be made into one.
    made: dict[str, dict[str, Tensor]] = {}
    loaded: set[str] = set()
    for part in contents.parts:
        dense: dict[str, Tensor] = {}
        touched: set[int | None] = set()
        while part:
            name, value = part.popitem()
            stored = f"{name}.weight" if isinstance(value, Packed) else name
            linear = forms.experts.get(stored)
            if isinstance(value, Packed) and name in forms.inside:
                stored, linear = forms.inside[name]
            target, dtype = targets[stored], dtypes.get(targets[stored])
            if linear is not None:
                loaded.add(target)
                target = f"{linear}.weight"
            touched.add(blocks.index_of(target))
            where = f"{directory}: {shown_name(name)}"
            if isinstance(value, Packed):
                if (stored not in naming.renamed and linear is None) or not _is_linear(model, target):
                    raise ModelError(f"{where}: packed, but the model has no such linear")
                _replace(model, target, rounded_packed(where, value, dtype).to(device))
                loaded.add(target)
            elif name in forms.pieces:
                whole = rounded(where, value, dtype).to(device).contiguous()
                # Of their own, so that a bias does not keep a stack's tensor.
                dense |= {piece: place.of(whole).clone() for piece, place in forms.pieces[name].items()}
                loaded.add(target)
            elif name in naming.renamed or name in forms.experts:
                dense[target] = rounded(where, value, dtype).to(device)
            elif target in naming.made:
                waiting = made.setdefault(target, {})
                waiting[name] = value
                if len(waiting) == len(naming.made[target]):
                    for key, tensor in naming.make(target, made.pop(target)).items():
                        dense[key] = rounded(where, tensor, dtypes.get(key)).to(device)
            del value
        loaded |= dense.keys()
        model.load_state_dict(dense, strict=False, assign=True)  # names and shapes were checked
        _group(blocks.modules, touched)
    return loaded


def _group(blocks: nn.ModuleList, indices: Iterable[int | None]) -> None:
    for index in set(indices):
        if index is not None and index < len(blocks):
            group_linears(blocks[index])


def rounded_packed(where: str, packed: Packed, dtype: torch.dtype | None) -> Packed:
    """``rounded`` of a packed weight. It is unpacked only to name the row and column of what is not finite."""
    if not packed.values.is_floating_point():
        return packed
    if not is_finite(packed.values):
        check_finite(where, packed.unpack())
    if dtype is None or dtype == packed.dtype:
        return packed
    result = replace(packed, values=packed.values.to(dtype))
    if not is_finite(result.values):
        check_rounded(where, packed.unpack(), result.unpack())
    return result


def _is_linear(model: nn.Module, target: str) -> bool:
    module, _, kind = target.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(module), nn.Linear)


def _replace(model: nn.Module, target: str, packed: Packed) -> None:
    module = target.removesuffix(".weight")
    linear: Any = model.get_submodule(module)
    sparse: Any = stand_for(SparseLinear(packed), stack_of(linear))
    if linear.bias is not None:
        sparse.register_buffer("bias", linear.bias.detach())  # on meta until its own tensor is read
    model.set_submodule(module, sparse)
