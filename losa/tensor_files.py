"""Tensors of safetensors files, read one at a time into memory of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from losa.errors import ModelError

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


class _Place(NamedTuple):
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class TensorFiles:
    """A context in which the tensors of several files can be read by name.

    A mapped file counts as the process's memory as long as one of its tensors lives, beside every copy that is made
    of another; here nothing is mapped, and a tensor is aligned as torch allocates.

    Raises:
        ModelError: a file cannot be read, is no safetensors file, or holds a name that another one has.
    """

    def __init__(self, paths: Iterable[Path]):
        self._paths = list(paths)
        self._stack = ExitStack()
        self._files: dict[Path, BinaryIO] = {}
        self._places: dict[str, _Place] = {}

    def __enter__(self) -> TensorFiles:
        with ExitStack() as opening:
            for path in self._paths:
                try:
                    self._files[path] = file = opening.enter_context(path.open("rb"))
                    found = _header(file, path)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    raise _unreadable(path, getattr(error, "strerror", None) or "no safetensors file") from error
                if twice := sorted(self._places.keys() & found.keys()):
                    raise ModelError(f"{path}: {twice[0]} is in another file too")
                self._places |= found
            self._stack = opening.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            ModelError: no such tensor, or the file ends before it does.
        """
        if name not in self._places:
            raise ModelError(f"{self._paths[0].parent}: tensors are missing: {name}")
        path, dtype, shape, begin = self._places[name]
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            file = self._files[path]
            try:
                file.seek(begin)
                complete = file.readinto(target) == len(target)
            except OSError as error:
                raise _unreadable(path, error.strerror) from error
            if not complete:
                raise _unreadable(path, f"it ends within {name}")
        return tensor


def _header(file: BinaryIO, path: Path) -> dict[str, _Place]:
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError("header")
    entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    places = {}
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise ModelError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(int(side) for side in entry["shape"])
        begin, end = entry["data_offsets"]
        if min((0, *shape)) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(name)
        places[name] = _Place(path, dtype, shape, 8 + length + begin)
    return places


def _unreadable(path: Path, reason: str | None) -> ModelError:
    return ModelError(f"{path}: cannot be read ({reason})")
