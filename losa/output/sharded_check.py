"""A written model compared with the one that several processes hold in shards, block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from losa.distributed.processes import is_main, on_main, process_count, process_index
from losa.distributed.sharding import device_of, gathered_calls, whole
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.turns import everywhere
from losa.distributed.watch import progress
from losa.errors import ModelError, OutputError
from losa.model.block_calls import Call, hidden_of, same, split_call
from losa.model.blocks import find_blocks, find_linears
from losa.model.naming import Naming
from losa.model.running import evaluating
from losa.model.skeleton import empty_model, move_buffers
from losa.output.checks import (
    check_logits,
    check_masked,
    check_masked_names,
    check_same_names,
    check_tensor,
    check_tokenizer,
    check_zeros,
    some_ids,
)
from losa.record import RunRecord
from losa.storage.tensor_files import TensorFiles, checkpoint_tensors

logger = logging.getLogger("losa")


@torch.no_grad()
def check_sharded_export(
    directory: Path,
    model: nn.Module,
    tokenizer,
    record: RunRecord,
    masks: Mapping[str, Tensor],
    sample_ids: Tensor | None = None,
) -> int:
    """``losa.output.export.check_export`` of a model in shards; all processes call it.

    The model in memory runs once. Each block of the written model is made by one process, compared tensor by tensor,
    and given the input of the block in memory; the output must be the same to the bit. The main process runs what is
    outside of the written blocks, with the outputs of the blocks in memory in their place.

    Returns:
        the number of kept weights that are zero.

    Raises:
        Stopped: between blocks, if a signal asks for it.
        OutputError: in every process; says which check fails, and where.
    """
    check_masked_names(record, masks)
    ids = some_ids(model) if sample_ids is None else sample_ids
    trust = bool(record.recipe.get("trust_remote_code", False))
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        written = everywhere(partial(_open, directory, device_of(model), trust, stack))
        everywhere(partial(written.check_names, list(model.state_dict())))
        comparison = _Comparison(model, written, record, masks)
        comparison.run(ids)
        counts = together(lambda: comparison.counts)
    zeros, prunable, kept_zeros = map(sum, zip(*counts, strict=True))
    check_zeros(record, zeros, prunable)
    if tokenizer is not None:
        on_main(partial(_check_tokenizer, directory, tokenizer, ids, trust))
    if kept_zeros and is_main():
        logger.info("export: %d kept weights are zero", kept_zeros)
    return kept_zeros


@dataclass(frozen=True)
class _Written:
    """A written model without weights, whose weights are read from its files part by part."""

    model: Any
    files: TensorFiles
    naming: Naming
    device: torch.device

    def check_names(self, memory: list[str]) -> None:
        absent = set(self.naming.missing(self.naming.filled(self.files.stored)))
        there = [name for name in self.naming.expected if name not in absent]
        check_same_names([*there, *self.naming.unused], memory)

    def load(self, memory: Mapping[str, Tensor]) -> None:
        """Load the tensors that ``memory`` names, in the type in which users get them, and compare."""
        placed = {name: tensor.to(self.device) for name, tensor in self.naming.read(self.files, memory)}
        self.model.load_state_dict(placed, strict=False, assign=True)
        ties = getattr(self.model, "all_tied_weights_keys", {})
        # transformers warns of tied tensors that are both absent, as they are from every block.
        if placed.keys() & {*ties, *ties.values()}:
            self.model.tie_weights(missing_keys=self.naming.expected.keys() - placed.keys(), recompute_mapping=False)
        state = self.model.state_dict()
        check_same_names([name for name in memory if state[name].device.type != "meta"], memory)
        for name, original in memory.items():
            check_tensor(name, state[name], original.to(self.device))


def _open(directory: Path, device: torch.device, trust_remote_code: bool, stack: ExitStack) -> _Written:
    try:
        model = empty_model(directory, trust_remote_code=trust_remote_code).eval()
        files = stack.enter_context(checkpoint_tensors(directory))
        naming = Naming(model, files.names)
        naming.filled(files.stored)
    except ModelError as error:
        raise OutputError(f"export: the written model cannot be loaded: {error}") from error
    move_buffers(model, device)
    return _Written(model, files, naming, device)


@dataclass(frozen=True)
class _Pass:
    """What a block in memory was called with, and what it returned."""

    hidden: Tensor
    call: Call
    output: Any


class _Comparison:
    """A pass of the model in memory, with the written model beside it.

    ``counts``: of the linears in the blocks that this process compared: the zeros, the weights, and the kept weights
    that are zero.
    """

    def __init__(self, model: Any, written: _Written, record: RunRecord, masks: Mapping[str, Tensor]):
        self.model, self.written, self.record, self.masks = model, written, record, masks
        self.blocks = find_blocks(model)
        self.passes: dict[int, _Pass] = {}
        self.counts = [0, 0, 0]

    def run(self, ids: Tensor) -> None:
        ids = ids.to(self.written.device)
        with ExitStack() as stack:
            # These hooks come before the hook that shards a block anew after its call.
            for index, block in enumerate(self.blocks):
                self._watch(index, block, stack)
            with gathered_calls(self.model, self.blocks):
                logits = self.model(ids, use_cache=False).logits
                on_main(partial(self._check_rest, ids, logits))

    def _watch(self, index: int, block: nn.Module, stack: ExitStack) -> None:
        calls: list[tuple[Tensor, Call]] = []

        def before(_module, args, kwargs):
            hidden, call = split_call(args, kwargs)
            calls.append((hidden.clone(), call))  # a block may work in its input's memory

        def after(_module, _args, output):
            progress(f"checking {self.blocks.names[index]}")
            check()
            seen = _Pass(*calls.pop(), output)
            masks = {n: whole(mask) for n, mask in self.masks.items() if self.blocks.index_of(n) == index}
            mine = index % process_count() == process_index()
            everywhere(partial(self._check_block, index, seen, masks) if mine else _nothing)
            if is_main():
                self.passes[index] = seen

        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(after).remove)

    def _check_block(self, index: int, seen: _Pass, masks: Mapping[str, Tensor]) -> None:
        name = self.blocks.names[index]
        memory = self.blocks.modules[index].state_dict()
        self.written.load({f"{name}.{part}": tensor for part, tensor in memory.items()})
        block = self.written.model.get_submodule(name)
        written = {f"{name}.{part}": module for part, module in find_linears(block, model=self.written.model).items()}
        if odd := sorted(masks.keys() - written.keys()):
            raise OutputError(f"export: {odd[0]} has a mask, but the written model has no such linear")
        for linear, module in written.items():
            weight = cast(Tensor, module.weight)
            if linear in masks:
                self.counts[2] += check_masked(linear, weight, masks[linear], self.record.masks[linear])
            self.counts[0] += weight.numel() - int(torch.count_nonzero(weight))
            self.counts[1] += weight.numel()
        found = seen.call.run(block, seen.hidden.clone())
        if not torch.equal(found, hidden_of(seen.output)):
            raise OutputError(f"export: the written model's logits differ from those in memory, from {name} on")
        block.to("meta")

    def _check_rest(self, ids: Tensor, logits: Tensor) -> None:
        """Compare what is outside of the blocks, and logits, with the blocks in memory in the written blocks' place."""
        memory = self.model.state_dict()
        self.written.load({name: t for name, t in memory.items() if self.blocks.index_of(name) is None})
        check_same_names(self.blocks.names, [self.blocks.names[index] for index in self.passes])
        for index, name in enumerate(self.blocks.names):
            self.written.model.get_submodule(name).forward = partial(_play, name, self.passes[index])
        check_logits(self.written.model(ids, use_cache=False).logits, logits)


def _play(name: str, seen: _Pass, *args, **kwargs) -> Any:
    """The output of a block in memory, if the written block is called as that one was."""
    hidden, call = split_call(args, kwargs)
    given, expected = ([*_values((h, c.args, c.kwargs))] for h, c in ((hidden, call), (seen.hidden, seen.call)))
    if not same(given, expected):
        raise OutputError(f"export: the written model's logits differ from those in memory, before {name}")
    return seen.output


def _values(argument: Any) -> Iterator[Any]:
    """The tensors, numbers and words in an argument of a block. Other objects may differ between two models."""
    if isinstance(argument, Mapping):
        argument = list(argument.values())
    if isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _values(part)
    elif isinstance(argument, (Tensor, bool, int, float, str)):
        yield argument


def _check_tokenizer(directory: Path, tokenizer, ids: Tensor, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    try:
        written = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises errors of many kinds
        raise OutputError(f"export: the written tokenizer cannot be loaded: {error}") from error
    check_tokenizer(written, tokenizer, ids)


def _nothing() -> None:
    """The turn of another process."""
