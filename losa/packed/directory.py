"""Packed checkpoints: a Hugging Face directory whose pruned linears are stored without their zeros.

A directory holds ``losa_packed.json`` (format version, and per linear its format, shape and pattern; SHA-256 of every
tensor), one safetensors file per decoder block and one for the rest, and the other files of the directory it was made
from. Tensors keep the names that they have there (``losa.model.naming`` says which of the model they are). Packing,
unpacking and loading hold one block's dense weights at a time, never the model's. The directories of compressed-tensors
(``losa.packed.compressed_tensors``) are written and read here too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from losa.errors import LosaError, ModelError, reason
from losa.inference.sparsify import densify
from losa.model.finite import check_finite, check_rounded, is_finite
from losa.model.grouping import group_linears
from losa.model.loading import DTYPES, load_model, torch_device
from losa.model.naming import Naming, checked_naming
from losa.model.probing import read_directly
from losa.model.saving import guard_saving, state_untied, untied_though_stated
from losa.model.skeleton import skeleton
from losa.modules.sparse import SparseLinear
from losa.packed import compressed_tensors
from losa.packed.manifest import MANIFEST, Linear, Manifest, block_file, read_manifest
from losa.packed.parts import Contents, Part, Shards, copy_other_files, packed_parts, state_dtype
from losa.packed.weights import FORMATS, MIN_SPARSITY, pack_weight
from losa.storage.files import check_apart, staged_directory
from losa.storage.kinds import COMPRESSED, is_compressed, is_packed, refuse_adapter
from losa.storage.tensor_files import TensorFiles, shown_name
from losa_kernels.packing import Packed

logger = logging.getLogger("losa")

FILE_FORMATS = (*FORMATS, *COMPRESSED)


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

    What was written is loaded and run on a few tokens before the directory gets its name: for that time the packed
    weights, and never the dense ones, are in memory. Linears whose weight the model reads itself, past their forward
    (Mamba's ``dt_proj``), stay dense.

    Args:
        format: of every linear: see ``losa.packed.weights.pack_weight``; or "sparse-bitmask" or "sparse-24-bitmask", a
            directory as compressed-tensors 0.12.2 writes it.
        dtype: to round floating-point tensors to first; None keeps each tensor's.
        min_sparsity: linears with a smaller share of zeros are stored dense.

    Raises:
        ModelError: not such a directory, already packed, tensors that are not the model's or not finite, no linear
            has zeros enough, the format does not fit, or the packed model does not run.
        OutputError: ``output`` exists and ``overwrite`` is off, or a write failed; nothing is left behind.
    """
    source = Path(source)
    if format not in FILE_FORMATS:
        raise LosaError(f"format: expected one of {', '.join(FILE_FORMATS)}, got {format!r}")
    refuse_adapter(source)
    if is_packed(source):
        raise ModelError(f"{source}: is packed already")
    ours = format in FORMATS
    pack, needs = (partial(pack_weight, format=format), "") if ours else compressed_tensors.packer(format)
    leave: Set[str] = frozenset()
    parts = packed_parts(source, pack, dtype, min_sparsity, needs=needs)
    check_apart(output, source)
    with staged_directory(output, overwrite, force) as staged:
        copy_other_files(source, staged)
        state_dtype(staged, dtype)
        while True:
            report = _written(_write(staged, parts) if ours else compressed_tensors.write(staged, format, parts))
            read, untied = _try(staged, source)
            if not read:
                break
            logger.info("pack: %s (of %d) stays dense: the model reads its weight itself", min(read), len(read))
            leave |= read
            parts = packed_parts(source, pack, dtype, min_sparsity, leave, needs)
        if untied:
            state_untied(staged)
    return report


def _try(directory: Path, source: Path) -> tuple[Set[str], bool]:
    """Load what was written and run a few tokens: (packed linears whose weight the model reads itself, whether the
    config wrongly says that embeddings are tied).

    Raises:
        ModelError: it cannot be loaded, does not run, or its logits are not finite; speaks of ``source``.
    """
    try:
        if any(path.name.startswith(("token", "vocab", "spiece")) for path in directory.iterdir()):
            model, _ = load(directory)
        else:  # can be unpacked, and get a tokenizer later
            model = _load_weights(directory, open_packed(directory), torch.device("cpu"))
        packed = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        return read_directly(model) & packed, untied_though_stated(model)
    except ModelError as error:
        told = str(error).replace(str(directory), str(source))
        raise ModelError(f"pack: nothing was written, since it could not be used: {told}") from error


def _written(parts: Iterator[tuple[Part, int]]) -> PackReport:
    count = left = before = after = 0
    for part, written in parts:
        count, left = count + len(part.linears), left + len(part.left)
        before, after = before + part.source_bytes, after + written
    return PackReport(count, left, before, after)


def _write(directory: Path, parts: Iterator[Part]) -> Iterator[tuple[Part, int]]:
    """Each part with the bytes of its tensors as they were written."""
    manifest = Manifest()
    for part in parts:
        file = block_file(part.block)
        tensors = dict(part.dense)
        for linear, packed in part.linears.items():
            manifest.linears[linear] = Linear.of(packed)
            tensors |= {f"{linear}.{name}": t for name, t in packed.tensors().items()}
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        manifest.sha256 |= {name: _digest(t) for name, t in tensors.items()}
        manifest.files |= dict.fromkeys(tensors, file)
        save_file(tensors, directory / file, {"format": "pt"})
        yield part, sum(t.nbytes for t in tensors.values())
    manifest.write(directory)


def unpack_directory(source: Path, output: Path, *, overwrite: bool = False, force: bool = False) -> None:
    """The dense Hugging Face directory again, every tensor to the bit as it was packed (but for the sign of zeros).

    Raises:
        ModelError: ``source`` is no packed checkpoint, or a checksum differs.
        OutputError: as for ``pack_directory``.
    """
    source = Path(source)
    contents = open_packed(source)
    check_apart(output, source)
    with staged_directory(output, overwrite, force) as staged:
        copy_other_files(source, staged, leave=(MANIFEST,))
        compressed_tensors.forget(staged)
        shards = Shards(staged)
        for part in contents.parts:
            shards.write(dict(_dense(name, value) for name, value in part.items()))
        shards.finish()


def _dense(name: str, value: Packed | Tensor) -> tuple[str, Tensor]:
    return (f"{name}.weight", value.unpack()) if isinstance(value, Packed) else (name, value)


def load(directory: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """Load a packed checkpoint for inference: (model, tokenizer).

    The model is an ordinary transformers one whose pruned linears are ``SparseLinear``; its dense weights never exist.
    ``save_pretrained`` writes it dense.

    Raises:
        ModelError: no packed checkpoint, a damaged manifest, a checksum or shape differs, a tensor is missing, or
            weights are not finite.
    """
    from transformers import AutoTokenizer, GenerationConfig

    directory = Path(directory)
    contents = open_packed(directory)
    # First, since what reading a vocabulary takes for a moment is then not taken beside all weights.
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({reason(error)})") from error
    model = _load_weights(directory, contents, torch.device(device))
    if (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except Exception as error:
            raise ModelError(f"{directory}: generation_config.json cannot be read ({reason(error)})") from error
    return model, tokenizer


def load_any(
    model: str | Path, dtype: str = "auto", device: str = "auto", *, dense: bool = False
) -> tuple[nn.Module, object]:
    """Load a packed directory as ``load`` does, and any other model as ``losa.model.loading.load_model``.

    Args:
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        dense: unpack packed linears.

    Raises:
        ModelError: as those.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir() or not is_packed(directory):
        return load_model(str(model), dtype=dtype, device=device)
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    loaded, tokenizer = load(directory, torch_device(device))
    if dense:
        densify(loaded)
    if dtype != "auto":
        wanted = getattr(torch, dtype)
        packed = {n: m.packed for n, m in loaded.named_modules() if isinstance(m, SparseLinear)}
        for name, value in (dict(loaded.named_parameters()) | packed).items():
            _rounded(f"{model}: {name}", value, wanted)
        loaded = loaded.to(wanted)
    return loaded, tokenizer


def _load_weights(directory: Path, contents: Contents, device: torch.device) -> nn.Module:
    from accelerate import init_empty_weights

    kinds = [entry.dtype for entry in contents.stored.values() if entry.dtype.is_floating_point]
    with init_empty_weights(include_buffers=False):
        model = skeleton(directory, meta=False, fallback=kinds[0] if kinds else torch.float32)
    naming = checked_naming(model, contents.stored, contents.where)
    _fill(model, naming, contents, directory, device)
    naming.remember()
    guard_saving(model)
    return model.to(device).eval().requires_grad_(False)


def _fill(model: nn.Module, naming: Naming, contents: Contents, directory: Path, device: torch.device) -> None:
    blocks = naming.blocks
    targets, dtypes = naming.targets(), naming.dtypes()
    made: dict[str, dict[str, Tensor]] = {}
    loaded: set[str] = set()
    for part in contents.parts:
        dense: dict[str, Tensor] = {}
        touched = set()
        while part:
            name, value = part.popitem()
            target = targets[f"{name}.weight" if isinstance(value, Packed) else name]
            touched.add(blocks.index_of(target))
            where = f"{directory}: {shown_name(name)}"
            if isinstance(value, Packed):
                if not _is_linear(model, naming.renamed.get(f"{name}.weight", "")):
                    raise ModelError(f"{where}: packed, but the model has no such linear")
                _replace(model, target, _rounded(where, value, dtypes.get(target)).to(device))
                loaded.add(target)
            elif name in naming.renamed:
                dense[target] = _rounded(where, value, dtypes.get(target)).to(device)
            elif target in naming.made:
                waiting = made.setdefault(target, {})
                waiting[name] = value
                if len(waiting) == len(naming.made[target]):
                    for key, tensor in naming.make(target, made.pop(target)).items():
                        dense[key] = _rounded(where, tensor, dtypes.get(key)).to(device)
            del value
        loaded |= dense.keys()
        model.load_state_dict(dense, strict=False, assign=True)  # names and shapes were checked
        for index in touched & set(range(len(blocks))):
            group_linears(blocks.modules[index])
    unused = [name for name, target in naming.unused.items() if not naming.ignored(target)]
    if unused:
        others = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
        logger.warning("%s: the model has no place for %s%s", directory, shown_name(unused[0]), others)
    # What is stored stays, whatever the config says of ties; as in transformers' own loading.
    model.tie_weights(missing_keys=naming.expected.keys() - loaded, recompute_mapping=False)
    absent = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if absent:
        raise ModelError(f"{contents.where}: {len(absent)} tensors are missing: {', '.join(absent[:3])}")


def _rounded(where: str, value: Packed | Tensor, dtype: torch.dtype | None) -> Packed | Tensor:
    """In the type that transformers would keep it in; finite."""
    tensor = value.values if isinstance(value, Packed) else value
    if not tensor.is_floating_point():
        return value
    if not is_finite(tensor):
        check_finite(where, _whole(value))
    if dtype is None or dtype == tensor.dtype:
        return value
    rounded = tensor.to(dtype)
    result = replace(value, values=rounded) if isinstance(value, Packed) else rounded
    if not is_finite(rounded):
        check_rounded(where, _whole(value), _whole(result))
    return result


def _whole(value: Packed | Tensor) -> Tensor:
    """The weight, whose rows and columns a message can name."""
    return value.unpack() if isinstance(value, Packed) else value


def _is_linear(model: nn.Module, target: str) -> bool:
    module, _, kind = target.rpartition(".")
    return kind == "weight" and isinstance(model.get_submodule(module), nn.Linear)


def _replace(model: nn.Module, target: str, packed: Packed) -> None:
    module = target.removesuffix(".weight")
    linear = model.get_submodule(module)
    sparse = SparseLinear(packed)
    if linear.bias is not None:
        sparse.register_buffer("bias", linear.bias.detach())  # on meta until its own tensor is read
    model.set_submodule(module, sparse)


def open_packed(directory: Path) -> Contents:
    """What a packed directory holds; its parts are read one after the other. Raises ModelError as ``load``."""
    if (directory / MANIFEST).is_file():
        return _read(directory, read_manifest(directory))
    if is_compressed(directory):
        return compressed_tensors.read(directory)
    raise ModelError(f"{directory}: no packed checkpoint (no {MANIFEST}, nor a sparse format of compressed-tensors)")


def _read(directory: Path, manifest: Manifest) -> Contents:
    parts = manifest.parts()
    by_file: dict[str, list[str]] = {}
    for name, file in manifest.files.items():
        by_file.setdefault(file, []).append(name)
    places = {name: directory / file for name, file in manifest.files.items()}
    with TensorFiles(dict.fromkeys(places.values()), places, MANIFEST) as files:
        stored = files.stored
    if odd := sorted(stored.keys() - manifest.files.keys()):
        raise ModelError(f"{directory / MANIFEST}: does not list {shown_name(odd[0])}, which a file holds")

    def contents() -> Iterator[dict[str, Packed | Tensor]]:
        for file in sorted(by_file):
            found: dict[str, Packed | Tensor] = {}
            waiting: dict[str, dict[str, Tensor]] = {}
            with TensorFiles([directory / file]) as opened:
                for name in by_file[file]:
                    tensor = opened.get(name)
                    if _digest(tensor) != manifest.sha256[name]:
                        raise ModelError(f"{directory / file}: the checksum of {name} differs; the file is damaged")
                    linear = parts.get(name)
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

    return Contents(directory / MANIFEST, manifest.dense(stored), contents())


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
