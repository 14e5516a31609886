"""Loading a model that several processes hold together: each process reads its own rows of the files' tensors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from losa.distributed.processes import check_agreement, is_main, process_count
from losa.distributed.sharding import Sharding
from losa.distributed.turns import everywhere, on_each_machine
from losa.distributed.watch import progress
from losa.errors import ModelError
from losa.model.finite import check_finite, check_rounded, is_finite
from losa.model.hub_files import local_directory
from losa.model.naming import Naming
from losa.model.part_loading import empty_of, locate_files, names_of, put_parameters, tie
from losa.model.skeleton import move_buffers
from losa.storage.tensor_files import TensorFiles, checkpoint_tensors

logger = logging.getLogger("losa")


def load_sharded(
    model: str,
    sharding: Sharding,
    gguf_file: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, object]:
    """Load a causal language model, each process its rows of every parameter, and its tokenizer, in evaluation mode.

    All processes call it together. A process holds its rows and the tensor that it is reading, never the model. A
    weight that transformers makes from several stored tensors is made whole first, unless it is a stack of experts.
    Buffers are whole everywhere.

    Args:
        model: Hugging Face id or local directory, with safetensors files.
        sharding: how the parameters are held; its device is the one that the model computes on.
        gguf_file: GGUF files are refused.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".

    Returns:
        (model, tokenizer); all parameters of the model are DTensors.

    Raises:
        ModelError: in every process, as ``losa.model.loading.load_model``; or a GGUF file, or weights in another
            format than safetensors.
        OutputError: in every process; the processes do not read the same weights.
    """
    source = everywhere(partial(locate_files, model, gguf_file, dtype, "read in shards", "distributed.mode: ddp"))
    directory = local_directory(model, source, trust_remote_code)
    empty = partial(_empty_to_shard, model, directory, dtype, trust_remote_code)
    if trust_remote_code and process_count() > 1:
        # transformers copies the model's Python files to where it imports them from. One process copies.
        on_each_machine(empty)
    loaded, tokenizer = everywhere(empty)
    with ExitStack() as stack:
        files = everywhere(lambda: stack.enter_context(checkpoint_tensors(directory)))
        naming, found = everywhere(partial(names_of, model, directory, loaded, files))
        check_agreement(f"model {model!r}: weights", everywhere(partial(_sample, files)))
        tie(naming, files, found, sharding.rows)
        everywhere(partial(_fill, naming, files, sharding, found, f"model {model!r}"))
    if is_main():
        naming.warn_of_unused(directory)
    naming.remember()
    return loaded.eval(), tokenizer


def _empty_to_shard(*args) -> tuple[nn.Module, object]:
    empty, tokenizer = empty_of(*args)
    for name, parameter in empty.named_parameters():
        if not parameter.ndim:
            raise ModelError(
                f"model {args[0]!r}: {name}: a single number has no rows to shard; set distributed.mode: ddp"
            )
    return empty, tokenizer


def _sample(files: TensorFiles) -> str:
    """A digest of names, types and shapes of all stored tensors, and of each tensor's first and last bytes: two models
    of one architecture differ in it. To find every difference each machine would have to read all of the files."""
    digest = hashlib.sha256()
    for name, (dtype, shape) in sorted(files.stored.items()):
        progress(f"comparing {name}")
        digest.update(f"{name} {dtype} {shape} ".encode() + files.ends(name))
    return digest.hexdigest()[:16]


def _fill(naming: Naming, files: TensorFiles, sharding: Sharding, found: set[str], where: str) -> None:
    """Put this process's rows into the model on meta, tensor by tensor."""
    model, dtypes = naming.model, naming.dtypes()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held: dict[int, nn.Parameter] = {}

    def rows_of(name: str) -> range | None:
        return sharding.rows(len(parameters[name])) if name in parameters else None

    def put(name: str, rows: Tensor, whole: Callable[[], Tensor]) -> None:
        progress(f"loading {name}")
        if rows.is_floating_point():
            rows = rows.to(dtypes[name])
        if name not in parameters:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._buffers[leaf] = rows
            return
        if not is_finite(rows):
            # The whole tensor tells which row it is, and how many weights are wrong.
            tensor = whole()
            check_finite(f"{where}: {name}", tensor)
            check_rounded(f"{where}: {name}", tensor, tensor.to(dtypes[name]))
        empty = parameters[name]
        # Linears take the place of most stacks and transposed weights before anything is trained; FSDP2 pins the rest.
        sharded = sharding.from_rows(rows, empty.shape, pin=naming.holder(name) is None)
        held[id(empty)] = nn.Parameter(sharded, requires_grad=empty.requires_grad)

    def make(target: str, sources: Iterable[str]) -> dict[str, Tensor]:
        return naming.make(target, {source: files.get(source) for source in sources})

    def made(target: str) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
        """The rows of each tensor that is made with ``target``, and how to get all of its rows."""
        sources, stacked, mine = naming.made[target], naming.stacked(target), rows_of(target)
        if stacked is None or mine is None:
            for name, tensor in make(target, sources).items():
                rows = rows_of(name)
                yield name, tensor if rows is None else tensor[rows.start : rows.stop].clone(), tensor.detach
            return
        own = [source for row in mine for source in stacked[row]]
        experts = make(target, own)[target] if own else torch.empty(0, *parameters[target].shape[1:])
        yield target, experts, lambda: make(target, sources)[target]

    for source, target in naming.renamed.items():
        if target in found:
            put(target, files.get(source, rows_of(target)), partial(files.get, source))
    for target in naming.made:
        for name, tensor, whole in made(target):
            put(name, tensor, whole)
    put_parameters(model, held)
    move_buffers(model, sharding.device)
    if absent := [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]:
        raise ModelError(f"{where}: {len(absent)} tensors are missing: {', '.join(absent[:3])}")
