"""An export whose decoder blocks are in files already, of a model that is never in memory as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from losa.distributed.stop import check
from losa.distributed.watch import progress
from losa.errors import ModelError, OutputError
from losa.model.block_passes import BlockPasses
from losa.model.offloaded import OffloadedBlocks, load_offloaded
from losa.model.saving import untied_though_stated
from losa.output.checks import check_logits, check_same_names, check_tensor, check_tokenizer
from losa.output.export import give_mode_of
from losa.output.sharded_export import write_rest
from losa.packed.shards import shard_name, write_index, write_shard
from losa.record import RunRecord
from losa.storage.files import file_digest, staged_directory, staged_file
from losa.storage.tensor_files import TensorFiles


def write_block(source: OffloadedBlocks, index: int, directory: Path) -> Path:
    """Write the file of a block that is in memory, whose weights become M * W, and read the block from it from now on.
    What is read is compared with what is in memory.

    Returns:
        the file, whose name is the one that it has in an export.

    Raises:
        OutputError: the file cannot be written, or differs from the block in memory.
    """
    path = directory / shard_name(index + 2, len(source.blocks) + 1)
    tensors = source.merged(index)
    with staged_file(path) as staged:
        # What is stored may be copies, which are gone before the file is read.
        write_shard(staged, source.stored(tensors))
    source.read_from(index, path)
    for name, tensor in source.tensors(index):
        check_tensor(name, tensor, tensors[name].cpu())
        del tensor  # before the next one is read
    return path


def export_offloaded(
    source: OffloadedBlocks,
    tokenizer,
    output: Path,
    record: RunRecord,
    files: Mapping[Path, str],
    *,
    overwrite: bool = False,
    force: bool = False,
    sample_ids: Tensor,
) -> None:
    """``losa.output.export.export_model`` of a model whose blocks are offloaded.

    Args:
        source: the merged model's blocks.
        files: of the blocks, each compared with its block when it was written, and its SHA-256 then. They stay, and
            the output shares their bytes where the file system has hard links.
        sample_ids: (batch, length) int64 tokens for the check of logits.

    Raises:
        Stopped: between blocks, if a signal asks for it. The output is not there then.
        OutputError: as ``export_model``.
    """
    model = source.model
    with staged_directory(output, overwrite, force) as staged:
        write_rest(model, tokenizer, staged, output, record, {}, untied_though_stated(model))
        rest = staged / shard_name(1, len(files) + 1)
        write_shard(rest, source.stored(_outside(source)))
        for file, digest in files.items():
            progress(f"checking {file.name}")
            check()
            _link(file, staged / file.name)
            if file_digest(staged / file.name) != digest:
                raise OutputError(f"export: {file} is not the file that was written and checked; it is damaged")
        _write_index(staged, [rest.name, *(file.name for file in files)])
        _check(staged, source, tokenizer, record, sample_ids)


def _outside(source: OffloadedBlocks) -> dict[str, Tensor]:
    state = source.model.state_dict()
    return {name: tensor for name, tensor in state.items() if source.blocks.index_of(name) is None}


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, place)


def _write_index(staged: Path, names: Iterable[str]) -> None:
    places: dict[str, str] = {}
    size = 0
    for name in names:
        give_mode_of(staged / "config.json", staged / name)
        with TensorFiles([staged / name]) as opened:
            places |= dict.fromkeys(opened.names, name)
            size += sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in opened.stored.values())
    write_index(staged, dict(sorted(places.items())), size)


@torch.no_grad()
def _check(staged: Path, source: OffloadedBlocks, tokenizer, record: RunRecord, sample_ids: Tensor) -> None:
    """The written model has the names of the one that was pruned, the same tensors outside of the blocks, and the same
    logits to the bit; its tokenizer gives the same tokens."""
    memory = source.model.state_dict()

    def compared(name: str, tensor: Tensor) -> Tensor:
        """The tensor in memory, so that there is one of it."""
        check_same_names([name], [name] if name in memory else [])
        check_tensor(name, tensor, memory[name].cpu())
        return memory[name]

    trust = bool(record.recipe.get("trust_remote_code", False))
    try:
        written, reread, files = load_offloaded(
            str(staged), device=str(source.device), trust_remote_code=trust, held=compared
        )
    except ModelError as error:
        raise OutputError(f"export: the written model cannot be loaded: {error}") from error
    check_same_names(written.state_dict(), memory)
    check_logits(_logits(files, sample_ids), _logits(source, sample_ids))
    if tokenizer is not None:
        check_tokenizer(reread, tokenizer, sample_ids)


def _logits(source: OffloadedBlocks, ids: Tensor) -> Tensor:
    passes = BlockPasses(source.model, source.blocks, [ids])
    with passes.ended(0):
        return source.model(ids.to(passes.device), use_cache=False).logits.cpu()
