"""Tensors of safetensors files, read one at a time into memory of their own."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from losa.errors import ModelError, shown, shown_name
from losa.storage.json_files import each_key_once, read_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)


def checkpoint_tensors(directory: Path) -> TensorFiles:
    """The tensors that transformers loads: of model.safetensors, else of the files that the index names.

    Other safetensors files in the directory are no part of the checkpoint. Without model.safetensors and an index, a
    single file or one complete set of numbered shards is taken.

    Raises:
        ModelError: there are no such files, config.json names another file, or the index is damaged or names files or
            tensors that are not there.
    """
    _refuse_others(directory / "config.json")
    if (directory / WHOLE).is_file():
        return TensorFiles([directory / WHOLE])
    if (directory / INDEX).is_file():
        places = _index(directory)
        return TensorFiles(dict.fromkeys(places.values()), places)
    found = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter_"))
    shards = [shard for path in found if (shard := _SHARD.fullmatch(path.name))]
    if len(found) == 1 and not shards:
        return TensorFiles(found)
    if found and len(shards) == len(found) and len({(shard[1], shard[3]) for shard in shards}) == 1:
        if len(found) != int(shards[0][3]):
            raise ModelError(f"{directory}: {len(found)} of {int(shards[0][3])} shards are there, and no {INDEX}")
        return TensorFiles(found)
    if found:
        names = ", ".join(path.name for path in found[:3])
        raise ModelError(f"{directory}: no {WHOLE} and no {INDEX} that says which of {names} are the checkpoint")
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in directory.glob(kind))
    seen = f"; found {others[0]}, which transformers can load and save again as safetensors" if others else ""
    raise ModelError(f"{directory}: no safetensors files; expected a merged Hugging Face checkpoint{seen}")


def _refuse_others(path: Path) -> None:
    """Raises ModelError where config.json names a file of weights: transformers loads it, and losa would not."""
    config = read_json(path) if path.is_file() else None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named is not None:
        raise ModelError(
            f"{path}: transformers_weights: expected none, got {shown(named)}; load the model by transformers "
            "and save it again"
        )


def _index(directory: Path) -> dict[str, Path]:
    path = directory / INDEX
    index = read_json(path)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ModelError(f"{path}: expected an object with a weight_map of tensors to files")
    for name, file in weights.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ModelError(f"{path}: {shown_name(name)}: expected the name of a safetensors file, got {shown(file)}")
        inside = PurePosixPath(file)
        if inside.is_absolute() or ".." in inside.parts:
            raise ModelError(f"{path}: {shown_name(name)}: {shown(file)} lies outside of the directory")
        if not (directory / file).is_file():
            raise ModelError(f"{path}: {shown_name(name)}: there is no {shown_name(file)}")
    return {name: directory / file for name, file in weights.items()}


class Stored(NamedTuple):
    """Type and shape of a tensor, from a file's header."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class _Place(NamedTuple):
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class TensorFiles:
    """A context in which the tensors of several files can be read by name.

    Files are not mapped into memory: a mapped file counts as the process's memory while one of its tensors lives, in
    addition to copies of its other tensors. Tensors are aligned as torch allocates them.

    Args:
        expected: the tensors that must be there, and the file of each one, as the file ``listed`` states.

    Raises:
        ModelError: a file cannot be read, is no safetensors file, lacks an expected tensor, or holds a tensor with the
            name of a tensor in another file.
    """

    def __init__(self, paths: Iterable[Path], expected: Mapping[str, Path] | None = None, listed: str = INDEX):
        self._paths = list(paths)
        self._listed = listed
        self._expected = expected or {}
        self._stack = ExitStack()
        self._files: dict[Path, BinaryIO] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        self._places: dict[str, _Place] = {}

    def __enter__(self) -> TensorFiles:
        with ExitStack() as opening:
            for path in self._paths:
                try:
                    self._files[path] = file = opening.enter_context(path.open("rb"))
                    self._states[path] = _state(file)
                    found = _header(file, path)
                except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise _unreadable(path, getattr(error, "strerror", None) or "no safetensors file") from error
                if twice := sorted(self._places.keys() & found.keys()):
                    raise ModelError(f"{path}: {shown_name(twice[0])} is in another file too")
                self._places |= found
            for name, path in self._expected.items():
                if name not in self._places or self._places[name].path != path:
                    raise ModelError(f"{path}: {shown_name(name)} is not in it, though {self._listed} says so")
            self._stack = opening.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def check_unchanged(self) -> None:
        """Raises ModelError for a file that was written to since it was opened. A file that has taken its name since
        does not matter: the old one is read."""
        for path, file in self._files.items():
            if _state(file) != self._states[path]:
                raise ModelError(f"{path}: was written to while it was read")

    @property
    def names(self) -> list[str]:
        return list(self._places)

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Types and shapes, by name; no tensor is read."""
        return {name: Stored(place.dtype, place.shape) for name, place in self._places.items()}

    def get(self, name: str, rows: range | None = None) -> Tensor:
        """The tensor, or only its ``rows`` (consecutive ones, along the first dimension), on the CPU.

        Raises:
            ModelError: no such tensor, or the file ends before it does.
        """
        if name not in self._places:
            raise ModelError(f"{self._paths[0].parent}: tensors are missing: {name}")
        _, dtype, shape, _ = self._places[name]
        skipped = 0
        if rows is not None:
            skipped = rows.start * math.prod(shape[1:]) * dtype.itemsize
            shape = (len(rows), *shape[1:])
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            values: Any = tensor.view(-1).view(torch.uint8).numpy()
            self._read(name, skipped, memoryview(values))
        return tensor

    def ends(self, name: str, size: int = 4096) -> bytes:
        """The first and the last bytes of a tensor, ``size`` of each. Raises ModelError as ``get``."""
        _, dtype, shape, _ = self._places[name]
        count = math.prod(shape) * dtype.itemsize
        found = bytearray(2 * min(size, count))
        middle = len(found) // 2
        self._read(name, 0, memoryview(found)[:middle])
        self._read(name, count - middle, memoryview(found)[middle:])
        return bytes(found)

    def _read(self, name: str, skipped: int, target: memoryview) -> None:
        """Fill ``target`` with a tensor's bytes, of which so many come before."""
        path, _, _, begin = self._places[name]
        file = self._files[path]
        try:
            file.seek(begin + skipped)
            complete = file.readinto(target) == len(target)  # type: ignore[attr-defined]
        except OSError as error:
            raise _unreadable(path, error.strerror) from error
        if not complete:
            raise _unreadable(path, f"it ends within {name}")


def _state(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _header(file: BinaryIO, path: Path) -> dict[str, _Place]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _LONGEST_HEADER:
        raise ValueError("header")
    entries = json.loads(file.read(length), object_pairs_hook=each_key_once)
    entries.pop("__metadata__", None)
    held = file.seek(0, 2) - 8 - length
    places = {}
    spans = []
    for name, entry in entries.items():
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise ModelError(f"{path}: {shown_name(name)} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise ModelError(f"{path}: {shown_name(name)}: shape and data_offsets must be lists of whole numbers")
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ModelError(f"{path}: {shown_name(name)}: the header gives a shape of {shape} {end - begin} bytes")
        if end > held:
            raise _unreadable(path, f"it ends within {shown_name(name)}")
        places[name] = _Place(path, dtype, tuple(shape), 8 + length + begin)
        spans.append((begin, end, name))
    for (_, end, first), (begin, stop, second) in pairwise(sorted(span for span in spans if span[0] < span[1])):
        if begin < end:
            raise ModelError(
                f"{path}: {shown_name(first)} and {shown_name(second)} overlap (bytes {begin} to {min(end, stop)})"
            )
    return places


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _unreadable(path: Path, reason: str | None) -> ModelError:
    return ModelError(f"{path}: cannot be read ({reason})")
