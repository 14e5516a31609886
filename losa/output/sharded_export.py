"""``export_model`` for several processes: of a model that they hold in shards, each writes some decoder blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from losa.distributed.agreement import check_shared
from losa.distributed.processes import on_main, process_count, process_index
from losa.distributed.sharding import gathered, gathered_calls, sharding_of
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.watch import progress
from losa.errors import OutputError, reason
from losa.model.blocks import Blocks, find_blocks
from losa.model.naming import as_stored, saved_names
from losa.model.saving import untied_though_stated
from losa.output.checks import check_merged
from losa.output.export import export_model, give_mode_of, save_model, write_report
from losa.output.sharded_check import check_sharded_export
from losa.packed.shards import shard_name, write_index, write_shard
from losa.record import RunRecord
from losa.storage.files import WRITE_ERRORS, staged_directory
from losa.storage.tensor_files import WHOLE


def export_together(
    model: nn.Module,
    tokenizer,
    output: Path,
    record: RunRecord,
    masks: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
    force: bool = False,
    sample_ids: Tensor | None = None,
    extra_files: Mapping[str, Path] | None = None,
) -> None:
    """``export_model``, called by all processes. A whole model is written by the main process. Of a model in shards no
    process ever holds more than a decoder block, or all that is outside of the blocks: the processes write a file for
    each block by turns, and compare it by turns with the block in memory.

    Args:
        output: on a file system that all processes share.
        masks: packed, whole or in shards.

    Raises:
        Stopped: between files of a model in shards, if a signal asks for it. The output is not there then.
        OutputError: in every process, as ``export_model``.
        ValueError: the model still has adapters.
    """
    options: dict[str, Any] = {"sample_ids": sample_ids, "extra_files": extra_files}
    if sharding_of(model) is None:
        write = partial(export_model, model, tokenizer, output, record, masks, overwrite=overwrite, force=force)
        on_main(partial(write, **options))
        return
    check_merged(model)
    with ExitStack() as stack:
        staged = on_main(lambda: stack.enter_context(staged_directory(output, overwrite, force)))
        check_shared(staged)
        with gathered_calls(model, find_blocks(model)):
            untied = untied_though_stated(model)
        on_main(partial(write_rest, model, tokenizer, staged, output, record, extra_files or {}, untied))
        _write_weights(model, staged, output)
        check_sharded_export(staged, model, tokenizer, record, masks, sample_ids)
        on_main(stack.close)


def write_rest(
    model: nn.Module,
    tokenizer,
    staged: Path,
    output: Path,
    record: RunRecord,
    extra_files: Mapping[str, Path],
    untied: bool,
) -> None:
    """Write everything of an export but the weights. Raises OutputError, naming ``output``."""
    with _named(output):
        save_model(model, tokenizer, staged, untied=untied, state_dict={})
        # transformers may write a file without tensors, which would hide the files that the index names.
        (staged / WHOLE).unlink(missing_ok=True)
        write_report(staged, record, extra_files)


def _write_weights(model: nn.Module, staged: Path, output: Path) -> None:
    """Write a file for each part of the model, by as many processes at once as there are, and the index."""
    blocks, wanted = find_blocks(model), set(saved_names(model))
    places: dict[str, tuple[str, int]] = {}
    mine: dict[str, dict[str, Tensor]] = {}

    def write() -> dict[str, tuple[str, int]]:
        written: dict[str, tuple[str, int]] = {}
        for file, tensors in mine.items():
            stored = as_stored(model, tensors)
            with _named(output):
                write_shard(staged / file, stored)
                give_mode_of(staged / "config.json", staged / file)
            written |= {name: (file, tensor.nbytes) for name, tensor in stored.items()}
        mine.clear()
        return written

    last = len(blocks)
    for number, tensors in enumerate(_parts(model, blocks)):
        progress(f"writing file {number + 1} of {last + 1}")
        if number % process_count() == process_index():
            kept = {name: tensor.cpu() for name, tensor in tensors.items() if name in wanted}
            mine[shard_name(number + 1, last + 1)] = kept
        if number == last or (number + 1) % process_count() == 0:
            for written in together(write):
                places |= written
            check()

    def write_places() -> None:
        with _named(output):
            files = {name: file for name, (file, _) in sorted(places.items())}
            write_index(staged, files, sum(size for _, size in places.values()))

    on_main(write_places)


def _parts(model: nn.Module, blocks: Blocks) -> Iterator[dict[str, Tensor]]:
    """All that is outside of the decoder blocks, then each block: whole tensors by name in the model."""
    with gathered_calls(model, blocks):
        yield {name: tensor for name, tensor in model.state_dict().items() if blocks.index_of(name) is None}
    for prefix, block in zip(blocks.names, blocks, strict=True):
        with gathered(block):
            yield {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}


@contextmanager
def _named(output: Path) -> Iterator[None]:
    try:
        yield
    except WRITE_ERRORS as error:
        raise OutputError(f"output {output}: {reason(error)}") from error
