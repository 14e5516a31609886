"""Several processes under ``torchrun`` or ``accelerate launch``: which launches are supported, which process does what,
and how the processes wait, agree and add up. Nothing else in losa asks for a rank."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor

from losa.errors import LosaError, OutputError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_DEEPSPEED = (
    "train: DeepSpeed is not supported: pruning needs whole weights, which ZeRO-3 shards, and the adapters' optimiser "
    "state is small; launch plain DDP (accelerate launch --multi_gpu)"
)
# Seconds between two looks at whether the main process is done.
_POLL = 0.05

_T = TypeVar("_T")
_calls = itertools.count()


def check_kind(kind: DistributedType) -> None:
    """Raises LosaError unless it is one process or plain DDP."""
    if kind == DistributedType.DEEPSPEED:
        raise LosaError(_DEEPSPEED)
    if kind not in SUPPORTED:
        raise LosaError(f"train: {kind.value} is not supported; launch plain DDP (accelerate launch --multi_gpu)")


def start_processes(device: str) -> str:
    """Join the other processes, if there are any.

    Args:
        device: the recipe's.

    Returns:
        the device that this process works on: ``device``, but for "auto" with several processes, which get one each.

    Raises:
        LosaError: launched with a plugin that shards weights. The launcher's variables say so before anything is
            loaded; accelerate itself finds out when a trainer is made.
    """
    if _launched_with("DEEPSPEED"):
        raise LosaError(_DEEPSPEED)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for plugin, kind in (("FSDP", DistributedType.FSDP), ("MEGATRON_LM", DistributedType.MEGATRON_LM)):
            if _launched_with(plugin):
                check_kind(kind)
    process = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return str(process.device) if device == "auto" and process_count() > 1 else device


def _launched_with(plugin: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true", "yes")


def process_count() -> int:
    """How many processes have joined; 1 without torch.distributed."""
    return dist.get_world_size() if _joined() else 1


def process_index() -> int:
    """This process's number, from 0; 0 before the processes have joined."""
    return dist.get_rank() if _joined() else 0


def launched_index() -> int:
    """The number that the launcher gave to this process, for use before the processes have joined."""
    return int(os.environ.get("RANK") or "0")


def is_main() -> bool:
    """Whether this is the process that writes and talks to the user."""
    return process_index() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def from_rank_zero(tensor: Tensor) -> Tensor:
    """Process 0's tensor, a new one on the device of this process's own, so that all processes decide alike. A process
    that is alone gets its own tensor back."""
    if process_count() == 1:
        return tensor
    device = torch.device("cuda") if dist.get_backend() == "nccl" else tensor.device
    shared = tensor.to(device, copy=True, memory_format=torch.contiguous_format)
    dist.broadcast(shared, 0)
    return shared.to(tensor.device)


def sum_over_processes(statistic: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape and dtype, a new tensor. It waits for the processes, not for the
    device."""
    total = statistic.clone()
    if process_count() > 1:
        dist.all_reduce(total)
    return total


def on_main(work: Callable[[], _T]) -> _T:
    """Run ``work`` in the main process and return its result in every process.

    The other processes look into the processes' key-value store, without a collective: they may wait for hours, where
    a barrier would give up after its time limit, and they learn at once that the main process failed or is gone.

    Args:
        work: its result can be pickled.

    Raises:
        LosaError: in the other processes, when ``work`` failed in the main process. The main process raises the error
            of ``work`` itself.
    """
    if process_count() == 1:
        return work()
    store: Any = dist.distributed_c10d._get_default_store()
    key = f"losa/{next(_calls)}"
    if not is_main():
        return _wait(store, key)
    try:
        result = work()
    except BaseException:
        store.set(key, pickle.dumps((False, None)))
        raise
    store.set(key, pickle.dumps((True, result)))
    return result


def _wait(store, key: str):
    try:
        while not store.check([key]):
            time.sleep(_POLL)
        done, result = pickle.loads(store.get(key))
    except RuntimeError as error:  # the store went with the process that held it
        raise LosaError("the main process ended before its work was done; its own message says why") from error
    if not done:
        raise LosaError("the main process failed; its own message says why")
    return result


def check_agreement(what: str, value: str) -> None:
    """Make sure that every process has the same ``value``.

    Raises:
        OutputError: in every process; names two that differ and what each has.
    """
    if process_count() == 1:
        return
    values = [""] * process_count()
    dist.all_gather_object(values, value)
    other = next((i for i, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise OutputError(
            f"{what}: process 0 has {values[0]}, process {other} has {values[other]}; the processes must read the same "
            "files, so inputs and output belong on a file system that all of them share"
        )
