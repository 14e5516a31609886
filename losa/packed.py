"""Packed checkpoints: a Hugging Face directory whose pruned linears are stored without their zeros.

A directory holds ``losa_packed.json`` (format version, and per linear its format, shape and pattern; SHA-256 of every
tensor), one safetensors file per decoder block and one for the rest, and the other files of the directory it was made
from. Packing, unpacking and loading hold one block's dense weights at a time, never the model's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from losa.errors import ModelError, OutputError
from losa.files import staged_directory, write_json
from losa.model import block_linears, find_blocks
from losa.modules import SparseLinear
from losa.sparse import MIN_SPARSITY, group_linears, pack_weight, zero_share
from losa_kernels.packing import Packed, Packed24, PackedBitmask, PackedNM

MANIFEST = "losa_packed.json"
VERSION = 1
REST = "rest.safetensors"
_CLASSES = {"bitmask": PackedBitmask, "nm": PackedNM, "24": Packed24}
_NAMES = {kind: name for name, kind in _CLASSES.items()}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf")


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
) -> PackReport:
    """Write the checkpoint in ``source`` (a Hugging Face directory of safetensors, merged) in packed form.

    Args:
        format: of every linear; see ``losa.sparse.pack_weight``.
        dtype: to round floating-point tensors to first; None keeps each tensor's.
        min_sparsity: linears with a smaller share of zeros are stored dense.

    Raises:
        ModelError: not such a directory, already packed, or no linear has zeros enough.
        OutputError: ``output`` exists and ``overwrite`` is off, or a write failed; nothing is left behind.
    """
    source = Path(source)
    if (source / MANIFEST).exists():
        raise ModelError(f"{source}: is packed already")
    skeleton = _skeleton(source)
    prefix, blocks = find_blocks(skeleton)
    linears = block_linears(skeleton)
    manifest: dict = {"version": VERSION, "linears": {}, "files": {}, "sha256": {}}
    before = after = left_dense = 0
    with _DenseFiles(source) as files, staged_directory(output, overwrite) as staged:
        _copy_other_files(source, staged)
        if dtype is not None:
            _state_dtype(staged / "config.json", dtype)
        for file, names in _by_file(files.names, prefix, len(blocks)):
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensor = files.get(name)
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                before += tensor.numel() * tensor.element_size()
                linear = name.removesuffix(".weight")
                if linear in linears and name.endswith(".weight"):
                    if zero_share(tensor) >= min_sparsity:
                        packed = pack_weight(tensor, format)
                        manifest["linears"][linear] = _describe(packed)
                        tensors |= {f"{linear}.{part}": t for part, t in packed.tensors().items()}
                        continue
                    left_dense += 1
                tensors[name] = tensor
            after += sum(t.numel() * t.element_size() for t in tensors.values())
            manifest["sha256"] |= {name: _digest(t) for name, t in tensors.items()}
            manifest["files"] |= dict.fromkeys(tensors, file)
            save_file({name: t.contiguous() for name, t in tensors.items()}, staged / file, {"format": "pt"})
        if not manifest["linears"]:
            raise ModelError(f"{source}: none of {left_dense} linears has {min_sparsity:.0%} zeros; is it pruned?")
        write_json(staged / MANIFEST, manifest)
    return PackReport(len(manifest["linears"]), left_dense, before, after)


def unpack_directory(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """The dense Hugging Face directory again, every tensor to the bit as it was packed (but for the sign of zeros).

    Raises:
        ModelError: ``source`` is no packed checkpoint, or a checksum differs.
        OutputError: as for ``pack_directory``.
    """
    source = Path(source)
    manifest = _manifest(source)
    files = sorted(set(manifest["files"].values()))
    index: dict = {"metadata": {"total_size": 0}, "weight_map": {}}
    with staged_directory(output, overwrite) as staged:
        _copy_other_files(source, staged)
        for number, file in enumerate(files, 1):
            dense: dict[str, Tensor] = {}
            for name, value in _read(source, file, manifest):
                dense |= {f"{name}.weight": value.unpack()} if isinstance(value, Packed) else {name: value}
            shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_file(dense, staged / shard, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(dense, shard)
            index["metadata"]["total_size"] += sum(t.numel() * t.element_size() for t in dense.values())
        write_json(staged / "model.safetensors.index.json", index)


def is_packed(directory: Path) -> bool:
    return (Path(directory) / MANIFEST).is_file()


def load(directory: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """Load a packed checkpoint for inference: (model, tokenizer).

    The model is an ordinary transformers one whose pruned linears are ``SparseLinear``; its dense weights never exist.

    Raises:
        ModelError: no packed checkpoint, a checksum or shape differs, or a tensor is missing.
    """
    from accelerate import init_empty_weights
    from transformers import AutoTokenizer, GenerationConfig

    directory = Path(directory)
    manifest = _manifest(directory)
    with init_empty_weights(include_buffers=False):
        model = _skeleton(directory, meta=False)
    block_of = {_block_file(index): block for index, block in enumerate(find_blocks(model)[1])}
    for file in sorted(set(manifest["files"].values())):
        dense = {}
        for name, value in _read(directory, file, manifest):
            if isinstance(value, Packed):
                _replace(model, name, value.to(device))
            else:
                dense[name] = value.to(device)
        _, unexpected = model.load_state_dict(dense, strict=False, assign=True)
        if unexpected:
            raise ModelError(f"{directory}: the model has no {unexpected[0]}")
        if file in block_of:
            group_linears(block_of[file])
    model.tie_weights()
    absent = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if absent:
        raise ModelError(f"{directory}: {len(absent)} tensors are missing: {', '.join(absent[:3])}")
    try:
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({error})") from error
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


def _read(directory: Path, file: str, manifest: dict) -> Iterator[tuple[str, Packed | Tensor]]:
    """(linear, packed weight) and (name, tensor) of one file, checked."""
    names = [name for name, place in manifest["files"].items() if place == file]
    parts = {f"{linear}.{part}": linear for linear, d in manifest["linears"].items() for part in d["tensors"]}
    waiting: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(directory / file, framework="pt") as stored:
            for name in names:
                tensor = stored.get_tensor(name)
                if _digest(tensor) != manifest["sha256"].get(name):
                    raise ModelError(f"{directory / file}: the checksum of {name} differs; the file is damaged")
                linear = parts.get(name)
                if linear is None:
                    yield name, tensor
                    continue
                collected = waiting.setdefault(linear, {})
                collected[name.removeprefix(f"{linear}.")] = tensor
                description = manifest["linears"][linear]
                if len(collected) == len(description["tensors"]):
                    yield linear, _rebuild(description, waiting.pop(linear))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory / file}: cannot be read ({error})") from error
    if waiting:
        raise ModelError(f"{directory / file}: tensors of {next(iter(waiting))} are missing")


def _describe(packed: Packed) -> dict:
    described = {"format": _NAMES[type(packed)], "shape": list(packed.shape), "tensors": sorted(packed.tensors())}
    if isinstance(packed, PackedNM):
        described |= {"keep_n": packed.keep_n, "m": packed.m}
    return described


def _rebuild(description: dict, tensors: dict[str, Tensor]) -> Packed:
    extra = {key: description[key] for key in ("keep_n", "m") if key in description}
    return _CLASSES[description["format"]](shape=tuple(description["shape"]), **tensors, **extra)


def _manifest(directory: Path) -> dict:
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{directory}: no packed checkpoint ({MANIFEST}: {error.strerror})") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON") from error
    if manifest.get("version") != VERSION:
        raise ModelError(f"{path}: expected format version {VERSION}, got {manifest.get('version')}")
    return manifest


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _by_file(names: list[str], prefix: str, blocks: int) -> Iterator[tuple[str, list[str]]]:
    """Each block's tensors in a file of their own, all others in one."""
    groups: dict[str, list[str]] = {_block_file(i): [] for i in range(blocks)}
    groups[REST] = []
    for name in names:
        number = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""
        groups[_block_file(int(number)) if number.isdigit() else REST].append(name)
    yield from ((file, found) for file, found in groups.items() if found)


class _DenseFiles:
    """The tensors of a directory's safetensors files, read one at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Callable[[str], Tensor]] = {}

    def __enter__(self) -> _DenseFiles:
        paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{self.directory}: no safetensors files; expected a merged Hugging Face checkpoint")
        try:
            for path in paths:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(opened.keys(), opened.get_tensor)
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise ModelError(f"{path}: cannot be read ({error})") from error
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def get(self, name: str) -> Tensor:
        return self._files[name](name)


def _copy_other_files(source: Path, target: Path) -> None:
    weights = {path for pattern in _WEIGHTS for path in source.glob(pattern)} | {source / MANIFEST}
    for path in source.iterdir():
        if path in weights:
            continue
        try:
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)
        except OSError as error:
            raise OutputError(f"cannot copy {path}: {error}") from error


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    write_json(path, config | {"dtype": str(dtype).removeprefix("torch.")})


def _skeleton(directory: Path, meta: bool = True) -> nn.Module:
    """The model that config.json describes, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: no config.json; expected a Hugging Face checkpoint")
    try:
        config = AutoConfig.from_pretrained(directory)
        dtype = config.get_text_config().dtype or torch.float32
        if not meta:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the model cannot be built from config.json ({error})") from error
