"""Packed checkpoints: a Hugging Face directory whose pruned linears are stored without their zeros.

A directory holds ``losa_packed.json`` (format version, and per linear its format, shape and pattern; SHA-256 of every
tensor), one safetensors file per decoder block and one for the rest, and the other files of the directory it was made
from. Packing, unpacking and loading hold one block's dense weights at a time, never the model's. The directories of
compressed-tensors (``losa.compressed``) are written and read here too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from losa import compressed
from losa.errors import LosaError, ModelError
from losa.files import staged_directory, write_json
from losa.model import find_blocks
from losa.modules import SparseLinear
from losa.sparse import FORMATS, MIN_SPARSITY, group_linears, pack_weight
from losa.streaming import Part, Shards, copy_other_files, packed_parts, skeleton, state_dtype
from losa.tensor_files import TensorFiles
from losa_kernels.packing import Packed, Packed24, PackedBitmask, PackedNM

MANIFEST = "losa_packed.json"
VERSION = 1
REST = "rest.safetensors"
FILE_FORMATS = (*FORMATS, *compressed.FORMATS)
_CLASSES = {"bitmask": PackedBitmask, "nm": PackedNM, "24": Packed24}
_NAMES = {kind: name for name, kind in _CLASSES.items()}


@dataclass(frozen=True)
class PackReport:
    """What packing did: counts of linears, and bytes of all tensors before and after."""

    packed: int
    dense: int
    dense_bytes: int
    packed_bytes: int


def pack_directory(
    source: Path,
    output: Path,
    *,
    format: str = "auto",
    dtype: torch.dtype | None = None,
    min_sparsity: float = MIN_SPARSITY,
    overwrite: bool = False,
    force: bool = False,
) -> PackReport:
    """Write the checkpoint in ``source`` (a Hugging Face directory of safetensors, merged) in packed form.

    Args:
        format: of every linear: see ``losa.sparse.pack_weight``; or "sparse-bitmask" or "sparse-24-bitmask", a
            directory as compressed-tensors 0.12.2 writes it.
        dtype: to round floating-point tensors to first; None keeps each tensor's.
        min_sparsity: linears with a smaller share of zeros are stored dense.

    Raises:
        ModelError: not such a directory, already packed, or no linear has zeros enough.
        OutputError: ``output`` exists and ``overwrite`` is off, or a write failed; nothing is left behind.
    """
    source = Path(source)
    if format not in FILE_FORMATS:
        raise LosaError(f"format: expected one of {', '.join(FILE_FORMATS)}, got {format!r}")
    if is_packed(source):
        raise ModelError(f"{source}: is packed already")
    ours = format in FORMATS
    pack = partial(pack_weight, format=format) if ours else compressed.packer(format)
    parts = packed_parts(source, pack, dtype, min_sparsity)
    count = left = before = after = 0
    with staged_directory(output, overwrite, force) as staged:
        copy_other_files(source, staged)
        state_dtype(staged, dtype)
        for part, written in _write(staged, parts) if ours else compressed.write(staged, format, parts):
            count, left = count + len(part.linears), left + len(part.left)
            before, after = before + part.source_bytes, after + written
    return PackReport(count, left, before, after)


def _write(directory: Path, parts: Iterator[Part]) -> Iterator[tuple[Part, int]]:
    """Each part with the bytes of its tensors as they were written."""
    manifest: dict = {"version": VERSION, "linears": {}, "files": {}, "sha256": {}}
    for part in parts:
        file = REST if part.block is None else _block_file(part.block)
        tensors = dict(part.dense)
        for linear, packed in part.linears.items():
            manifest["linears"][linear] = _describe(packed)
            tensors |= {f"{linear}.{name}": t for name, t in packed.tensors().items()}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        manifest["sha256"] |= {name: _digest(t) for name, t in tensors.items()}
        manifest["files"] |= dict.fromkeys(tensors, file)
        save_file(tensors, directory / file, {"format": "pt"})
        yield part, sum(t.nbytes for t in tensors.values())
    write_json(directory / MANIFEST, manifest)


def unpack_directory(source: Path, output: Path, *, overwrite: bool = False, force: bool = False) -> None:
    """The dense Hugging Face directory again, every tensor to the bit as it was packed (but for the sign of zeros).

    Raises:
        ModelError: ``source`` is no packed checkpoint, or a checksum differs.
        OutputError: as for ``pack_directory``.
    """
    source = Path(source)
    parts = _parts(source)
    with staged_directory(output, overwrite, force) as staged:
        copy_other_files(source, staged, leave=(MANIFEST,))
        compressed.forget(staged)
        shards = Shards(staged)
        for _, part in parts:
            shards.write(dict(_dense(name, value) for name, value in part.items()))
        shards.finish()


def _dense(name: str, value: Packed | Tensor) -> tuple[str, Tensor]:
    return (f"{name}.weight", value.unpack()) if isinstance(value, Packed) else (name, value)


def is_packed(directory: Path) -> bool:
    """Whether ``load`` reads it: packed by losa, or in a sparse format of compressed-tensors."""
    return (Path(directory) / MANIFEST).is_file() or compressed.is_compressed(Path(directory))


def load(directory: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """Load a packed checkpoint for inference: (model, tokenizer).

    The model is an ordinary transformers one whose pruned linears are ``SparseLinear``; its dense weights never exist.

    Raises:
        ModelError: no packed checkpoint, a checksum or shape differs, or a tensor is missing.
    """
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer, GenerationConfig

    directory = Path(directory)
    parts = _parts(directory)
    # First, since what reading a vocabulary takes for a moment is then not taken beside all weights.
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({error})") from error
    with init_empty_weights(include_buffers=False):
        model = skeleton(directory, meta=False)
    if (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except Exception as error:
            raise ModelError(f"{directory}: generation_config.json cannot be read ({error})") from error
    blocks = find_blocks(model)[1]
    for block, part in parts:
        dense = {}
        while part:
            name, value = part.popitem()
            if isinstance(value, Packed):
                _replace(model, name, value.to(device))
            else:
                dense[name] = value.to(device)
            del value
        try:
            _, unexpected = model.load_state_dict(dense, strict=False, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{directory}: {error}") from error
        if unexpected:
            raise ModelError(f"{directory}: the model has no {unexpected[0]}")
        if block is not None:
            group_linears(blocks[block])
    model.tie_weights()
    absent = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if absent:
        raise ModelError(f"{directory}: {len(absent)} tensors are missing: {', '.join(absent[:3])}")
    return model.to(device).eval().requires_grad_(False), tokenizer


def _replace(model: nn.Module, name: str, packed: Packed) -> None:
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{name}: the model has no such linear") from error
    shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
    if tuple(packed.shape) != shape:
        raise ModelError(f"{name}: the file has shape {tuple(packed.shape)}, the model {shape}")
    sparse = SparseLinear(packed)
    if linear.bias is not None:
        sparse.register_buffer("bias", linear.bias.detach())  # on meta until its own tensor is read
    model.set_submodule(name, sparse)


def _parts(directory: Path) -> Iterator[tuple[int | None, dict[str, Packed | Tensor]]]:
    """Per block (None: the rest of the model): packed weights by linear, other tensors by name."""
    if (directory / MANIFEST).is_file():
        return _read(directory, _manifest(directory))
    if compressed.is_compressed(directory):
        return compressed.read(directory)
    raise ModelError(f"{directory}: no packed checkpoint (no {MANIFEST}, nor a sparse format of compressed-tensors)")


def _read(directory: Path, manifest: dict) -> Iterator[tuple[int | None, dict[str, Packed | Tensor]]]:
    parts = {f"{linear}.{name}": linear for linear, d in manifest["linears"].items() for name in d["tensors"]}
    for file in sorted(set(manifest["files"].values())):
        found: dict[str, Packed | Tensor] = {}
        waiting: dict[str, dict[str, Tensor]] = {}
        with TensorFiles([directory / file]) as stored:
            for name in (name for name, place in manifest["files"].items() if place == file):
                tensor = stored.get(name)
                if _digest(tensor) != manifest["sha256"].get(name):
                    raise ModelError(f"{directory / file}: the checksum of {name} differs; the file is damaged")
                linear = parts.get(name)
                if linear is None:
                    found[name] = tensor
                    continue
                collected = waiting.setdefault(linear, {})
                collected[name.removeprefix(f"{linear}.")] = tensor
                description = manifest["linears"][linear]
                if len(collected) == len(description["tensors"]):
                    found[linear] = _rebuild(description, waiting.pop(linear))
        if waiting:
            raise ModelError(f"{directory / file}: tensors of {next(iter(waiting))} are missing")
        yield _block_index(file), found


def _describe(packed: Packed) -> dict:
    described = {"format": _NAMES[type(packed)], "shape": list(packed.shape), "tensors": sorted(packed.tensors())}
    if isinstance(packed, PackedNM):
        described |= {"keep_n": packed.keep_n, "m": packed.m}
    return described


def _rebuild(description: dict, tensors: dict[str, Tensor]) -> Packed:
    extra = {key: description[key] for key in ("keep_n", "m") if key in description}
    return _CLASSES[description["format"]](shape=tuple(description["shape"]), **tensors, **extra)


def _manifest(directory: Path) -> dict:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON") from error
    if manifest.get("version") != VERSION:
        raise ModelError(f"{path}: expected format version {VERSION}, got {manifest.get('version')}")
    return manifest


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _block_index(file: str) -> int | None:
    return None if file == REST else int(file.removeprefix("block-").partition(".")[0])
