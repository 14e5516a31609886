"""``losa_packed.json``, the list of what a packed directory holds, read into checked values."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from losa.errors import ModelError, shown, shown_name
from losa.packed.stacks import Stack, read_stack
from losa.packed.weights import FORMATS, format_of
from losa.storage.files import MANIFEST, write_json
from losa.storage.json_files import read_json
from losa.storage.tensor_files import Stored
from losa_kernels.packing import Packed

VERSION, WITH_STACKS = 1, 2  # of the format; an older reader would not put stacks together
REST = "rest.safetensors"
_FILE = re.compile(r"rest\.safetensors|block-(\d{5,9})\.safetensors", re.ASCII)
_LONGEST_SIDE = 2**31


@dataclass(frozen=True)
class Linear:
    """One packed weight: ``shape`` (out, in); ``numbers`` of its format by name (``keep_n`` and ``m`` of N:M)."""

    format: str
    shape: tuple[int, int]
    tensors: tuple[str, ...]
    numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: Packed) -> Linear:
        format = format_of(packed)
        numbers = {name: getattr(packed, name) for name in format.numbers}
        return cls(format.name, packed.shape, format.tensors, numbers)

    def build(self, tensors: dict[str, Tensor]) -> Packed:
        """The weight. Raises ValueError if the tensors contradict each other or this entry."""
        stored: dict[str, Any] = {"shape": self.shape, **tensors, **self.numbers}
        packed = FORMATS[self.format].kind(**stored)
        packed.check()
        return packed

    def to_dict(self) -> dict:
        return {"format": self.format, "shape": list(self.shape), "tensors": list(self.tensors), **self.numbers}


@dataclass
class Manifest:
    """``linears``: by name on disk; ``files`` and ``sha256``: of every stored tensor, by its name; ``stacks``: tensors
    of the dense checkpoint that hold weights of ``linears``, by name. Other linears are tensors of their own there."""

    linears: dict[str, Linear] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        linears = {name: linear.to_dict() for name, linear in self.linears.items()}
        content: dict[str, Any] = {"version": VERSION, "linears": linears}
        if self.stacks:
            stacks = {name: stack.to_dict() for name, stack in self.stacks.items()}
            content |= {"version": WITH_STACKS, "stacks": stacks}
        write_json(directory / MANIFEST, content | {"files": self.files, "sha256": self.sha256})

    def parts(self) -> dict[str, str]:
        """Name of each tensor of a packed weight -> name of its linear."""
        return {f"{name}.{part}": name for name, linear in self.linears.items() for part in linear.tensors}

    def dense(self, stored: dict[str, Stored]) -> dict[str, Stored]:
        """Type and shape of each tensor of the dense checkpoint that was packed, from types and shapes as stored."""
        parts = self.parts()
        held = {linear for stack in self.stacks.values() for linear in stack.places}
        packed = {
            f"{name}.weight": Stored(stored[f"{name}.values"].dtype, linear.shape)
            for name, linear in self.linears.items()
            if name not in held
        }
        for name, stack in self.stacks.items():
            packed[name] = Stored(stored[f"{next(iter(stack.places))}.values"].dtype, stack.shape)
        return {name: entry for name, entry in stored.items() if name not in parts} | packed


def block_file(index: int | None) -> str:
    """The file of a block's tensors; None: of the tensors that belong to no block."""
    return REST if index is None else f"block-{index:05d}.safetensors"


def block_of(file: str) -> int | None:
    found = _FILE.fullmatch(file)
    return None if found is None or found[1] is None else int(found[1])


def read_manifest(directory: Path) -> Manifest:
    """The directory's manifest.

    Raises:
        ModelError: the manifest is damaged; names the file, the entry, what was expected and what it got.
    """
    path = directory / MANIFEST
    data = read_json(path)
    try:
        return _parse(data)
    except _WrongError as error:
        raise ModelError(f"{path}: {error}") from error


class _WrongError(Exception):
    """What is wrong with a manifest; the message does not name the file."""


def _parse(data: object) -> Manifest:
    data = _object(data, "the file")
    version = data.get("version")
    if type(version) is not int or version not in (VERSION, WITH_STACKS):
        raise _WrongError(f"expected format version {VERSION} or {WITH_STACKS}, got {shown(version)}")
    linears = {name: _linear(name, entry) for name, entry in _object(data.get("linears"), "linears").items()}
    files, digests = _object(data.get("files"), "files"), _object(data.get("sha256"), "sha256")
    for name, file in files.items():
        if not isinstance(file, str) or _FILE.fullmatch(file) is None:
            known = f"{REST} or block-NNNNN.safetensors"
            raise _WrongError(f"files: {shown_name(name)}: expected {known}, got {shown(file)}")
    for name, digest in digests.items():
        if not isinstance(digest, str) or re.fullmatch("[0-9a-f]{64}", digest) is None:
            raise _WrongError(f"sha256: {shown_name(name)}: expected 64 hexadecimal digits, got {shown(digest)}")
    if odd := sorted(files.keys() ^ digests.keys()):
        raise _WrongError(f"{shown_name(odd[0])} is in files or in sha256, not in both")
    manifest = Manifest(linears, files, digests)
    shapes = {name: linear.shape for name, linear in linears.items()}
    for name, entry in _object(data.get("stacks", {}) if version == WITH_STACKS else {}, "stacks").items():
        try:
            manifest.stacks[name] = read_stack(entry, shapes)
        except ValueError as error:
            raise _WrongError(f"stacks: {shown_name(name)}: {error}") from error
    _check_stacks(manifest)
    for name, linear in linears.items():
        places = {files.get(f"{name}.{part}") for part in linear.tensors}
        if None in places:
            absent = next(part for part in linear.tensors if f"{name}.{part}" not in files)
            raise _WrongError(f"files: tensors are missing: {shown_name(f'{name}.{absent}')}")
        if len(places) > 1:
            raise _WrongError(f"files: the tensors of {shown_name(name)} are in more than one file")
        if f"{name}.weight" in files:
            raise _WrongError(f"{shown_name(name)} is stored packed and dense")
    parts = manifest.parts()
    beside = {part for format in FORMATS for part in FORMATS[format].tensors if part != "values"}
    for name in files:
        linear = name.removesuffix(".values")
        packed = {f"{linear}.{part}" for part in beside} & files.keys()
        if name != linear and name not in parts and packed:
            raise _WrongError(f"linears: {shown_name(linear)} is missing, whose tensors are in files")
    return manifest


def _check_stacks(manifest: Manifest) -> None:
    uses = Counter(linear for stack in manifest.stacks.values() for linear in stack.places)
    for linear, count in uses.most_common(1):
        if count > 1:
            raise _WrongError(f"stacks: {shown_name(linear)} is in {count} of them")
    alone = {f"{linear}.weight" for linear in manifest.linears.keys() - uses.keys()}
    for name, stack in manifest.stacks.items():
        first = next(iter(stack.places))
        places = {manifest.files.get(f"{each}.values") for each in stack.places}
        if len(places) > 1:
            raise _WrongError(f"stacks: the linears of {shown_name(name)} are in more than one file")
        if name in manifest.files or name in alone:
            raise _WrongError(f"stacks: {shown_name(name)} is stored beside {shown_name(first)}")


def _object(value: object, what: str) -> dict:
    if not isinstance(value, dict):
        raise _WrongError(f"{what}: expected an object, got {shown(value)}")
    return value


def _linear(name: str, entry: object) -> Linear:
    where = f"linears: {shown_name(name)}"
    entry = _object(entry, where)
    format, shape, tensors = entry.get("format"), entry.get("shape"), entry.get("tensors")
    if not isinstance(format, str) or format not in FORMATS:
        raise _WrongError(f"{where}: expected a format among {', '.join(FORMATS)}, got {shown(format)}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_side(side) for side in shape):
        raise _WrongError(f"{where}: expected a shape of two positive numbers, got {shown(shape)}")
    wanted = FORMATS[format]
    if not isinstance(tensors, list) or sorted(map(str, tensors)) != list(wanted.tensors):
        raise _WrongError(f"{where}: {format} has the tensors {', '.join(wanted.tensors)}, got {shown(tensors)}")
    numbers: dict[str, Any] = {number: entry.get(number) for number in wanted.numbers}
    try:
        wanted.check_numbers((shape[0], shape[1]), numbers)
    except ValueError as error:
        raise _WrongError(f"{where}: {error}") from error
    for other in FORMATS:
        theirs = FORMATS[other].numbers
        if any(entry.get(number) is not None for number in theirs if number not in wanted.numbers):
            told = f"only the format {other} has {' and '.join(theirs)}, not {format}"
            raise _WrongError(f"{where}: {told}")
    return Linear(format, (shape[0], shape[1]), wanted.tensors, numbers)


def _is_side(value: object) -> bool:
    return type(value) is int and 0 < value <= _LONGEST_SIDE
