"""Files of a Hugging Face directory: shards of tensors with their index, and everything that is no weight."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from losa.errors import OutputError
from losa.storage.files import write_json
from losa.storage.kinds import read_config
from losa.storage.tensor_files import INDEX

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


class Shards:
    """Writes the tensors of a Hugging Face directory, shard by shard, then their index."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._shards: list[list[str]] = []
        self._bytes = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        self._shards.append(list(tensors))
        self._bytes += write_shard(self._path(len(self._shards)), tensors)

    def finish(self) -> None:
        """Give the shards their names, which say how many shards there are, and write the index."""
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = shard_name(number, len(self._shards))
            self._path(number).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        write_index(self.directory, weight_map, self._bytes)

    def _path(self, number: int) -> Path:
        return self.directory / f"model-{number:05d}.safetensors"


def shard_name(number: int, count: int) -> str:
    """The file of shard ``number``, from 1, of ``count``."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> int:
    """Write tensors into a file, which is then on the disk. Returns their bytes."""
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, path, {"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sum(t.nbytes for t in contiguous.values())


def write_index(directory: Path, weight_map: dict[str, str], size: int) -> None:
    """Write which file each tensor is in; ``size``: bytes of all tensors."""
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def copy_other_files(source: Path, target: Path, leave: Iterable[str] = ()) -> None:
    """Copy all files but weights, in subdirectories too; files that a pattern in ``leave`` names stay behind."""
    weights = {path for pattern in (*_WEIGHTS, *leave) for path in source.glob(pattern)}
    for path in source.iterdir():
        if path in weights:
            continue
        try:
            if path.is_dir():
                shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(*_WEIGHTS))
            else:
                shutil.copyfile(path, target / path.name)
        except OSError as error:
            raise OutputError(f"cannot copy {path}: {error}") from error


def state_dtype(directory: Path, dtype: torch.dtype | None) -> None:
    """Write into config.json which type the weights have now; None leaves it as it is."""
    if dtype is not None:
        config = read_config(directory)
        config.pop("torch_dtype", None)
        write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
