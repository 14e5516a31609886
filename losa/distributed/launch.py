"""How processes start together under torchrun, accelerate launch or SLURM, and which launches are supported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from losa.distributed.agreement import check_same_start
from losa.distributed.joining import ALONE, Place, join, read_place
from losa.distributed.processes import joined, launched_per_machine, process_count
from losa.distributed.stop import heeding_signals
from losa.distributed.watch import Limits, watched
from losa.errors import LosaError, RecipeError
from losa.recipe.sections import DistributedConfig

# Engines of accelerate's launcher, by the variable that asks for them.
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported: its ZeRO-3 shards the weights, which pruning needs whole, "
    "its own way; launch without it (torchrun) and set distributed.mode: fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; launch with torchrun and set distributed.mode: fsdp",
}
_PARALLEL = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
}
# A collective gives up after so many times distributed.timeout: the watch, which names processes, comes first, and a
# process with little to do may wait for one with much.
_PATIENCE = 2


@contextmanager
def working_together(device: str, config: DistributedConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    """Within the context the processes of a run work together: they have joined, heed signals, watch each other, and
    have the same code and settings.

    Args:
        device: the recipe's.
        config: the recipe's section.
        settings: what all processes must have alike, such as the recipe, as plain nested data.

    Yields:
        the device that this process works on (``start_processes``).

    Raises:
        LosaError: in every process; names what is wrong, and with which process.
        Stopped, ProcessLost: from the work within.
    """
    with heeding_signals():
        own_device = start_processes(device, config)
        with watched(Limits(progress=config.timeout)):
            check_same_start(settings)
            check_config(config, process_count(), launched_per_machine())
            yield own_device


def start_processes(device: str, config: DistributedConfig | None = None) -> str:
    """Join the other processes, if there are any. A process that is alone forms a group of one where a launcher
    started it, or for ``cpu_offload``, which needs shards.

    Args:
        device: the recipe's.
        config: the recipe's section.

    Returns:
        the device that this process works on: ``device``, but for "auto" and "cuda" with several processes, which get
        one GPU each.

    Raises:
        LosaError: in every process, before anything is loaded: a launch that is not supported, or processes that cannot
            find each other.
    """
    from accelerate import PartialState

    config = config or DistributedConfig()
    place = read_place()
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    problem = None
    try:
        check_launcher()
        device = _own_device(device, kind, place)
    except LosaError as error:
        if place is None or joined():
            raise
        problem = str(error)
    if not joined() and (place is not None or config.cpu_offload):
        join(place or ALONE, kind, problem, _PATIENCE * timedelta(seconds=config.timeout))
    if PartialState(cpu=kind == "cpu").num_processes != process_count():
        raise LosaError("distributed: expected RANK and WORLD_SIZE of a launcher, found variables of MPI; use torchrun")
    if kind == "cuda" and device.startswith("cuda:"):
        # Rows that wait in host memory do not name a GPU: they become whole on the current one. A number that is not
        # here is refused by name when the model is loaded.
        with suppress(RuntimeError):
            torch.cuda.set_device(device)
    return device


def _own_device(device: str, kind: str, place: Place | None) -> str:
    if place is None or place.count == 1 or kind == "cpu":
        return device
    if device not in ("auto", "cuda"):
        raise LosaError(f"device: expected auto, cuda or cpu with several processes, got {device}")
    count = torch.cuda.device_count()
    # A launcher that shows each process its own GPU alone gives all of them the number 0.
    if count > 1 and place.local_index >= count:
        raise LosaError(f"LOCAL_RANK: expected a number below {count}, the GPUs here, got {place.local_index}")
    index = place.local_index % count
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def check_launcher() -> None:
    """Raises LosaError where accelerate's launcher asks for an engine, or a kind of parallelism, that losa does not
    work with."""
    for variable, message in _ENGINES.items():
        if _is_on(variable):
            raise LosaError(f"distributed: {message}")
    for variable, name in _PARALLEL.items():
        size = os.environ.get(variable, "1").strip()
        if size not in ("", "0", "1"):
            raise LosaError(f"distributed: {name} is not supported ({variable}={size}); set distributed.mode: fsdp")
    version = os.environ.get("FSDP_VERSION", "1")
    if _is_on("ACCELERATE_USE_FSDP") and version != "2":
        raise LosaError(
            f"distributed: FSDP version {version} is not supported (FSDP_VERSION); launch with --fsdp_version 2, or "
            "without FSDP and set distributed.mode: fsdp"
        )


def as_launched(config: DistributedConfig) -> DistributedConfig:
    """The section with what the launcher says: mode "auto" under accelerate's FSDP is "fsdp"."""
    if config.mode == "auto" and _is_on("ACCELERATE_USE_FSDP"):
        return config.model_copy(update={"mode": "fsdp"})
    return config


def check_config(config: DistributedConfig, processes: int, per_machine: int) -> None:
    """Make sure that a section fits the number of processes, and of processes of one machine.

    Raises:
        RecipeError: names the setting.
    """
    if config.mode == "ddp" and _is_on("ACCELERATE_USE_FSDP"):
        raise RecipeError("distributed.mode: ddp, but the processes were launched with FSDP (ACCELERATE_USE_FSDP)")
    if config.mode != "hsdp":
        return
    if processes == 1:
        raise RecipeError("distributed.mode: hsdp needs several processes, and there is one; take fsdp")
    size = config.shard_size or per_machine
    if processes % size:
        default = "" if config.shard_size else ", the processes of one machine"
        raise RecipeError(f"distributed.shard_size: expected a divisor of {processes} processes, got {size}{default}")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
