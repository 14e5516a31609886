"""Packed checkpoints: a Hugging Face directory whose pruned linears are stored without their zeros.

A directory holds ``losa_packed.json`` (format version, and per linear its format, shape and pattern; SHA-256 of every
tensor), one safetensors file per decoder block and one for the tensors of no block, and the other files of the dense
directory. Tensors keep the names that they have in the dense directory (``losa.model.naming`` knows their names in the
model). Packing, unpacking and loading hold one block's dense weights at a time, never the model's. The directories of
compressed-tensors (``losa.packed.compressed_tensors``) are written and read here too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from losa.errors import LosaError, ModelError, reason, shown_name
from losa.model.finite import rounded
from losa.model.loading import DTYPES, load_model, torch_device
from losa.model.probing import read_directly
from losa.model.replacing import unpacked_as_they_were
from losa.model.saving import state_untied, untied_though_stated
from losa.modules.sparse import SparseLinear, unpack_linears
from losa.packed import block_files, compressed_tensors
from losa.packed.filling import load_weights, rounded_packed
from losa.packed.formats import AUTO, all_names
from losa.packed.parts import Contents, PackedPart, packed_parts
from losa.packed.shards import Shards, copy_other_files, state_dtype
from losa.packed.stacks import Stack
from losa.packed.weights import COMPRESSED_FORMATS, FORMATS, MIN_SPARSITY, pack_weight
from losa.storage.files import MANIFEST, check_apart, staged_directory
from losa.storage.kinds import is_compressed, is_packed, refuse_adapter
from losa_kernels.packing import Packed

logger = logging.getLogger("losa")


@dataclass(frozen=True)
class PackReport:
    """What packing did: the numbers of packed and of dense linears, and the bytes of all tensors before and after."""

    packed: int
    dense: int
    dense_bytes: int
    packed_bytes: int


def pack_directory(
    source: Path,
    output: Path,
    *,
    format: str = AUTO,
    dtype: torch.dtype | None = None,
    min_sparsity: float = MIN_SPARSITY,
    overwrite: bool = False,
    force: bool = False,
) -> PackReport:
    """Write the checkpoint in ``source`` (a Hugging Face directory of safetensors, merged) in packed form.

    The result is loaded and run on a few tokens before the directory gets its name. Meanwhile all packed weights are in
    memory, and never all dense ones. Linears whose weight the model reads itself, instead of calling the linear
    (Mamba's ``dt_proj``), stay dense.

    Args:
        source: the directory to read.
        output: the directory to write.
        format: of every linear: see ``losa.packed.weights.pack_weight``; or "sparse-bitmask" or "sparse-24-bitmask", a
            directory as compressed-tensors 0.12.2 writes it.
        dtype: floating-point tensors are rounded to it first; None keeps the type of each tensor.
        min_sparsity: linears with a smaller share of zeros are stored dense; what is one tensor on disk, as stacked
            experts are, counts as one.
        overwrite: replace an existing output that losa wrote.
        force: replace an existing output whoever wrote it.

    Raises:
        ModelError: no such directory, already packed, tensors that do not belong to the model or are not finite, no
            linear with enough zeros, a format that does not fit, or a packed model that does not run.
        OutputError: ``output`` exists and ``overwrite`` is off, or a write failed; nothing is left behind.
    """
    source = Path(source)
    if format not in all_names():
        raise LosaError(f"format: expected one of {', '.join(all_names())}, got {format!r}")
    refuse_adapter(source)
    if is_packed(source):
        raise ModelError(f"{source}: is packed already")
    theirs = COMPRESSED_FORMATS.get(format)
    pack = partial(pack_weight, format=format) if theirs is None else theirs.pack
    needs = "" if format == AUTO else (theirs or FORMATS[format]).needs
    leave: Set[str] = frozenset()
    read_parts = partial(packed_parts, source, pack, dtype, min_sparsity, needs=needs, stacks=theirs is None)
    parts = read_parts()
    check_apart(output, source)
    with staged_directory(output, overwrite, force) as staged:
        copy_other_files(source, staged)
        state_dtype(staged, dtype)
        while True:
            if theirs is None:
                report = _counted(block_files.write(staged, parts))
            else:
                report = _counted(compressed_tensors.write(staged, parts, theirs))
            read, untied = _try(staged, source)
            if not read:
                break
            logger.info("pack: %s (of %d) stays dense: the model reads its weight itself", min(read), len(read))
            leave |= read
            parts = read_parts(leave=leave)
        if untied:
            state_untied(staged)
    return report


def _try(directory: Path, source: Path) -> tuple[Set[str], bool]:
    """Load the packed directory and run a few tokens: (packed linears whose weight the model reads itself, whether the
    config wrongly states that embeddings are tied).

    Raises:
        ModelError: the directory cannot be loaded, the model does not run, or its logits are not finite; the message
            names ``source``.
    """
    try:
        if any(path.name.startswith(("token", "vocab", "spiece")) for path in directory.iterdir()):
            model, _ = load(directory)
        else:  # a directory without a tokenizer can still be unpacked, and can get a tokenizer later
            model = load_weights(directory, open_packed(directory), torch.device("cpu"))
        packed = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
        return read_directly(model) & packed, untied_though_stated(model)
    except ModelError as error:
        told = str(error).replace(str(directory), str(source))
        raise ModelError(f"pack: nothing was written, since it could not be used: {told}") from error


def _counted(parts: Iterator[tuple[PackedPart, int]]) -> PackReport:
    count = left = before = after = 0
    for part, written in parts:
        count, left = count + len(part.linears), left + len(part.left)
        before, after = before + part.source_bytes, after + written
    return PackReport(count, left, before, after)


def unpack_directory(source: Path, output: Path, *, overwrite: bool = False, force: bool = False) -> None:
    """Write the dense Hugging Face directory again. Each tensor has the bits that were packed, except signs of zeros.

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
            shards.write(_dense(part, contents.stacks, contents.where))
        shards.finish()


def _dense(part: dict[str, Packed | Tensor], stacks: Mapping[str, Stack], where: Path) -> dict[str, Tensor]:
    """The tensors of the dense checkpoint; ``part`` is used up. Raises ModelError: a stack's linears do not make it."""
    found: dict[str, Tensor] = {}
    for name, stack in stacks.items():
        if next(iter(stack.places)) in part:
            linears = {linear: cast(Packed, part.pop(linear)) for linear in stack.places}
            try:
                found[name] = stack.join(linears)
            except ValueError as error:
                raise ModelError(f"{where}: {shown_name(name)}: {error}") from error
    while part:
        name, value = part.popitem()
        found |= {f"{name}.weight": value.unpack()} if isinstance(value, Packed) else {name: value}
    return found


def load(directory: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, object]:
    """Load a packed checkpoint for inference: (model, tokenizer).

    The model is an ordinary transformers model whose pruned linears are ``SparseLinear``. Its dense weights never
    exist. ``save_pretrained`` writes the model dense.

    Raises:
        ModelError: no packed checkpoint, a damaged manifest, a checksum or shape differs, a tensor is missing, or
            weights are not finite.
    """
    from transformers import AutoTokenizer, GenerationConfig

    directory = Path(directory)
    contents = open_packed(directory)
    # The tokenizer comes first: reading a vocabulary takes memory for a moment, and the weights are not there yet.
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({reason(error)})") from error
    model: Any = load_weights(directory, contents, torch.device(device))
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
        ModelError: as those two functions.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir() or not is_packed(directory):
        return load_model(str(model), dtype=dtype, device=device)
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    loaded, tokenizer = load(directory, torch_device(device))
    if dense:
        unpack_linears(loaded)
        unpacked_as_they_were(loaded)
    if dtype != "auto":
        wanted = getattr(torch, dtype)
        for name, parameter in loaded.named_parameters():
            rounded(f"{model}: {name}", parameter, wanted)
        for name, module in loaded.named_modules():
            if isinstance(module, SparseLinear):
                rounded_packed(f"{model}: {name}", module.packed, wanted)
        loaded = loaded.to(wanted)
    return loaded, tokenizer


def open_packed(directory: Path) -> Contents:
    """What a packed directory holds. Its parts are read on demand. Raises ModelError as ``load``."""
    if (directory / MANIFEST).is_file():
        return block_files.read(directory)
    if is_compressed(directory):
        return compressed_tensors.read(directory)
    raise ModelError(f"{directory}: no packed checkpoint (no {MANIFEST}, nor a sparse format of compressed-tensors)")
