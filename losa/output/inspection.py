"""A look into any checkpoint's zeros, packed or not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losa.errors import ModelError, OutputError
from losa.model.form_kinds import STACKED_PARTS
from losa.record import RunRecord
from losa.storage.files import RECORD
from losa.storage.json_files import read_json
from losa.storage.kinds import is_packed, read_config, refuse_adapter
from losa.storage.tensor_files import Stored, checkpoint_tensors
from losa_kernels.packing import Packed

if TYPE_CHECKING:
    from losa.packed.stacks import Stack

# Matrices of blocks have a number in their name: "model.layers.0.mlp.up_proj.weight", "h.0.attn.c_attn.weight". So have
# stacks of experts: "model.layers.0.mlp.experts.down_proj".
_OF_EXPERTS = "|".join(re.escape(f".{name}") for name in STACKED_PARTS)
BLOCK_WEIGHT = re.compile(rf"(.*?\.\d{{1,9}})\..*(weight|_proj|{_OF_EXPERTS})", re.ASCII)
MEASURED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class TensorSparsity:
    """One matrix, or a stack of matrices, as it lies in the files; ``zeros`` counts 0.0 and -0.0."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    total: int


@dataclass
class Inspection:
    """``record``: what losa wrote, or None; ``tensors``: every matrix inside a decoder block, measured.

    ``targets``: what tensors are called in the model, by their name in the files. ``unchecked``: why names and shapes
    were not compared with the names and shapes of the model; None if they were.
    """

    record: RunRecord | None
    tensors: list[TensorSparsity]
    targets: dict[str, str]
    unchecked: str | None
    packed: bool

    @property
    def sparsity(self) -> float:
        return sum(t.zeros for t in self.tensors) / max(1, sum(t.total for t in self.tensors))

    @property
    def lost_zeros(self) -> list[str]:
        """Matrices with more nonzero weights than their recorded masks keep: changed since losa wrote them."""
        kept = {} if self.record is None else {name: mask.kept for name, mask in self.record.masks.items()}
        lost = []
        for tensor in self.tensors:
            name = self.targets.get(tensor.name, tensor.name).removesuffix(".weight")
            own = [kept[name]] if name in kept else _of_stack(name, kept)
            if own and tensor.total - tensor.zeros > sum(own):
                lost.append(tensor.name)
        return lost


def _of_stack(name: str, kept: dict[str, int]) -> list[int]:
    """How many weights are kept of each linear that lies in a stack of that name in the model."""
    patterns = [rf"{re.escape(name)}\.\d+\.linear"]
    for parameter, parts in STACKED_PARTS.items():
        if name.endswith(f".{parameter}"):
            patterns.append(rf"{re.escape(name.removesuffix(parameter))}\d+\.({'|'.join(parts)})")
    linear = re.compile("|".join(patterns))
    return [count for each, count in kept.items() if linear.fullmatch(each)]


def inspect_directory(directory: Path) -> Inspection:
    """Measure the zeros of any Hugging Face directory from its safetensors, one tensor in memory at a time (one block
    of a packed checkpoint). Where transformers knows the model, names and shapes are compared with it first.

    Raises:
        OutputError: no such directory, no safetensors or no floating-point matrix of a block in it, a damaged file, or
            tensors that are not the model's; names file and tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise OutputError(f"{directory}: no such directory")
    record = _read_record(directory / RECORD)
    measured = []
    try:
        contents = _contents(directory)
        for name, tensor in contents.tensors:
            shape = tensor.shape
            if name in contents.unread:
                continue
            if BLOCK_WEIGHT.fullmatch(name) and len(shape) in (2, 3):
                values = tensor.values if isinstance(tensor, Packed) else tensor
                if values.dtype in MEASURED and (total := math.prod(shape)):
                    zeros = total - int(torch.count_nonzero(values))
                    measured.append(TensorSparsity(name, tuple(shape), zeros, total))
    except ModelError as error:
        raise OutputError(str(error)) from error
    if not measured:
        raise OutputError(f"{directory}: found no floating-point matrix of a decoder block")
    return Inspection(record, measured, contents.targets, contents.unchecked, contents.packed)


@dataclass
class _Contents:
    """Every tensor under its name in the dense checkpoint, read one by one; ``unread``: names of those that no linear
    has; the other entries as in ``Inspection``."""

    tensors: Iterator[tuple[str, Packed | Tensor]]
    targets: dict[str, str]
    unchecked: str | None
    packed: bool = False
    unread: Set[str] = frozenset()


def _contents(directory: Path) -> _Contents:
    from losa.packed.directory import open_packed

    if not (directory / "config.json").is_file():
        refuse_adapter(directory)
        return _Contents(_dense_tensors(directory), {}, "no config.json")
    if is_packed(directory):
        packed = open_packed(directory)
        targets, unchecked, unread = _compare(directory, packed.stored, packed.where, packed.stacks)
        every = (item for part in packed.parts for item in part.items())
        named = ((f"{name}.weight" if isinstance(tensor, Packed) else name, tensor) for name, tensor in every)
        return _Contents(named, targets, unchecked, packed=True, unread=unread)
    if read_config(directory).get("quantization_config"):
        return _Contents(_dense_tensors(directory), {}, "quantised")
    with checkpoint_tensors(directory) as files:
        targets, unchecked, unread = _compare(directory, files.stored, directory)
    return _Contents(_dense_tensors(directory), targets, unchecked, unread=unread)


def _dense_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    with checkpoint_tensors(directory) as files:
        for name, stored in files.stored.items():
            if len(stored.shape) in (2, 3) and BLOCK_WEIGHT.fullmatch(name):
                yield name, files.get(name)


def _compare(
    directory: Path, stored: dict[str, Stored], where: Path, stacks: Mapping[str, Stack] = MappingProxyType({})
) -> tuple[dict[str, str], str | None, Set[str]]:
    """Compare with config.json's model: names in the model by name in the files, None, and ``Naming.unread``; or
    nothing, and why a comparison is impossible. Raises ModelError if a tensor does not fit."""
    from losa.model.naming import checked_naming
    from losa.model.skeleton import skeleton
    from losa.packed.stacks import linears_inside

    try:
        model = skeleton(directory)
    except ModelError as error:
        return {}, str(error), frozenset()
    naming = checked_naming(model, stored, where)
    inside = linears_inside(naming.parts, stacks, where)
    targets = naming.targets() | {name: f"{linear}.weight" for name, linear in naming.experts.items()}
    targets |= {f"{name}.weight": f"{linear}.weight" for name, (_, linear) in inside.items()}
    return targets, None, naming.unread


def _read_record(path: Path) -> RunRecord | None:
    if not path.exists():
        return None
    try:
        return RunRecord.from_dict(read_json(path))
    except (ModelError, ValueError) as error:
        raise OutputError(f"{path}: damaged ({error})") from error
