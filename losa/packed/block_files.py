"""A packed directory as losa writes it: one safetensors file per block, listed in ``losa_packed.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from losa.errors import ModelError, shown_name
from losa.packed.manifest import Linear, Manifest, block_file, read_manifest
from losa.packed.parts import Contents, PackedPart
from losa.storage.files import MANIFEST
from losa.storage.tensor_files import TensorFiles
from losa_kernels.packing import Packed


def write(directory: Path, parts: Iterator[PackedPart]) -> Iterator[tuple[PackedPart, int]]:
    """Write a file for each part, and the manifest at the end. Yields each part with the bytes of its tensors."""
    manifest = Manifest()
    for part in parts:
        file = block_file(part.block)
        tensors = dict(part.dense)
        for linear, packed in part.linears.items():
            manifest.linears[linear] = Linear.of(packed)
            tensors |= {f"{linear}.{name}": t for name, t in packed.tensors().items()}
        manifest.stacks |= part.stacks
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        manifest.sha256 |= {name: digest(t) for name, t in tensors.items()}
        manifest.files |= dict.fromkeys(tensors, file)
        save_file(tensors, directory / file, {"format": "pt"})
        yield part, sum(t.nbytes for t in tensors.values())
    manifest.write(directory)


def read(directory: Path) -> Contents:
    """What the directory holds.

    Raises:
        ModelError: a damaged manifest, or files that lack a tensor or hold one that the manifest does not list; while
            the parts are read: a checksum differs, or a weight's tensors contradict each other.
    """
    manifest = read_manifest(directory)
    places = {name: directory / file for name, file in manifest.files.items()}
    with TensorFiles(dict.fromkeys(places.values()), places, MANIFEST) as files:
        stored = files.stored
    if odd := sorted(stored.keys() - manifest.files.keys()):
        raise ModelError(f"{directory / MANIFEST}: does not list {shown_name(odd[0])}, which a file holds")
    dense, parts = manifest.dense(stored), _parts(directory, manifest)
    return Contents(directory / MANIFEST, manifest.linears.keys(), dense, parts, manifest.stacks)


def _parts(directory: Path, manifest: Manifest) -> Iterator[dict[str, Packed | Tensor]]:
    linears = manifest.parts()
    by_file: dict[str, list[str]] = {}
    for name, file in manifest.files.items():
        by_file.setdefault(file, []).append(name)
    for file in sorted(by_file):
        found: dict[str, Packed | Tensor] = {}
        waiting: dict[str, dict[str, Tensor]] = {}  # tensors of linears that are not complete yet
        with TensorFiles([directory / file]) as opened:
            for name in by_file[file]:
                tensor = opened.get(name)
                if digest(tensor) != manifest.sha256[name]:
                    raise ModelError(f"{directory / file}: the checksum of {name} differs; the file is damaged")
                linear = linears.get(name)
                if linear is None:
                    found[name] = tensor
                    continue
                collected = waiting.setdefault(linear, {})
                collected[name.removeprefix(f"{linear}.")] = tensor
                if len(collected) == len(manifest.linears[linear].tensors):
                    try:
                        found[linear] = manifest.linears[linear].build(waiting.pop(linear))
                    except ValueError as error:
                        raise ModelError(f"{directory / file}: {shown_name(linear)}: {error}") from error
        yield found


def digest(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes, in hexadecimal digits."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
