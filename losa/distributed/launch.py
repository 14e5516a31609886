"""How processes join, under ``torchrun``, ``accelerate launch`` or SLURM, and which launches are supported."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from losa.distributed.processes import launched_count, process_count
from losa.errors import LosaError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
_DEEPSPEED = (
    "distributed: DeepSpeed is not supported: its ZeRO-3 shards the weights, which pruning needs whole, its own way; "
    "launch without it (torchrun) and set distributed.mode: fsdp"
)


def check_kind(kind: DistributedType) -> None:
    """Raises LosaError for a launch with an engine that losa does not work with."""
    if kind == DistributedType.DEEPSPEED:
        raise LosaError(_DEEPSPEED)
    if kind not in SUPPORTED:
        raise LosaError(f"distributed: {kind.value} is not supported; launch with torchrun or accelerate launch")


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
    if launched_with("DEEPSPEED"):
        raise LosaError(_DEEPSPEED)
    if launched_count() > 1 and launched_with("MEGATRON_LM"):
        check_kind(DistributedType.MEGATRON_LM)
    process = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return str(process.device) if device == "auto" and process_count() > 1 else device


def launched_with(plugin: str) -> bool:
    """Whether ``accelerate launch`` was told to use a plugin: "FSDP", "DEEPSPEED" or "MEGATRON_LM"."""
    return os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() in ("1", "true", "yes")
