"""Dense tensors that are not the weight of one linear: of several (stacked experts), or a transposed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from losa.errors import ModelError, shown, shown_name
from losa.model.forms import Place
from losa_kernels.packing import Packed

_MOST_DIMENSIONS = 8
_LARGEST = 2**48  # elements


@dataclass(frozen=True)
class Stack:
    """``shape`` of the dense tensor; ``places``: where the weights lie in it, by the linear's name on disk. Together
    they fill it."""

    shape: tuple[int, ...]
    places: dict[str, Place]

    def join(self, packed: Mapping[str, Packed]) -> Tensor:
        """The dense tensor of the linears' packed weights. Raises ValueError: they are of several types, or do not fill
        it."""
        dtypes = {packed[linear].dtype for linear in self.places}
        if len(dtypes) > 1:
            raise ValueError(f"expected linears of one type, got {', '.join(sorted(map(str, dtypes)))}")
        dense, filled = torch.empty(self.shape, dtype=dtypes.pop()), torch.zeros(self.shape, dtype=torch.bool)
        try:
            for linear, place in self.places.items():
                place.of(filled).fill_(True)
                place.of(dense).copy_(packed[linear].unpack())
        except RuntimeError as error:  # two entries of a linear in one place
            raise ValueError(f"{shown_name(linear)}: its stride and shape do not go together") from error
        if not bool(filled.all()):
            raise ValueError("two of its linears lie in one place")
        return dense

    def to_dict(self) -> dict:
        linears = {name: {"stride": list(p.stride), "offset": p.offset} for name, p in self.places.items()}
        return {"shape": list(self.shape), "linears": linears}


def split(
    tensor: Tensor, places: Mapping[str, Place], pack: Callable[[Tensor], Packed | None]
) -> dict[str, Packed] | None:
    """The weights in a dense tensor, each packed; None where one of them cannot be."""
    dense, found = tensor.contiguous(), {}
    for linear, place in places.items():
        if (packed := pack(place.of(dense).contiguous())) is None:
            return None
        found[linear] = packed
    return found


def linears_inside(
    parts: Mapping[str, Mapping[str, Place]], stacks: Mapping[str, Stack], where: Path
) -> dict[str, tuple[str, str]]:
    """Of packed linears that are no tensors of their own, by name on disk: the stored tensor of the dense checkpoint
    that they are part of, and their names in the model.

    Args:
        parts: of ``losa.model.naming.Naming``.
        stacks: of a packed directory.
        where: for messages.

    Raises:
        ModelError: the model has no such linear there.
    """
    found = {}
    for name, stack in stacks.items():
        linears = {place: part.removesuffix(".weight") for part, place in parts.get(name, {}).items()}
        for linear, place in stack.places.items():
            if place not in linears:
                raise ModelError(f"{where}: {shown_name(linear)}: packed, but the model has no such linear")
            found[linear] = name, linears[place]
    return found


def read_stack(entry: object, shapes: Mapping[str, tuple[int, int]]) -> Stack:
    """A manifest's entry.

    Args:
        entry: of ``Stack.to_dict``.
        shapes: of all packed linears, by name.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("linears"), dict) or not entry["linears"]:
        raise ValueError(f"expected an object with linears, got {shown(entry)}")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not 0 < len(shape) <= _MOST_DIMENSIONS or not all(map(_is_count, shape)):
        raise ValueError(f"expected a shape of positive numbers, got {shown(shape)}")
    size = math.prod(shape)
    if size > _LARGEST:
        raise ValueError(f"expected at most {_LARGEST} elements, got shape {shown(shape)}")
    places: dict[str, Place] = {}
    for name, place in entry["linears"].items():
        if name not in shapes:
            raise ValueError(f"{shown_name(name)} is no packed linear")
        stride, offset = (place.get("stride"), place.get("offset")) if isinstance(place, dict) else (None, None)
        if not isinstance(stride, list) or len(stride) != 2 or not all(map(_is_count, stride)):
            raise ValueError(f"{shown_name(name)}: expected a stride of two positive numbers, got {shown(stride)}")
        rows, columns = shapes[name]
        if type(offset) is not int or not 0 <= offset < size - (rows - 1) * stride[0] - (columns - 1) * stride[1]:
            raise ValueError(f"{shown_name(name)}: a weight {shapes[name]} does not lie within {tuple(shape)}")
        places[name] = Place((rows, columns), (stride[0], stride[1]), offset)
    if (filled := sum(math.prod(place.shape) for place in places.values())) != size:
        raise ValueError(f"its linears have {filled} weights, the tensor {tuple(shape)} has {size}")
    return Stack(tuple(shape), places)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST
