"""How processes start together under torchrun, accelerate launch or SLURM, and which launches are supported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from losa.distributed.agreement import check_same_start
from losa.distributed.joining import ALONE, Place, join, kept_by_launcher, read_place
from losa.distributed.processes import joined, launched, on_main, process_count
from losa.distributed.stop import heeding_signals
from losa.distributed.watch import Limits, watched
from losa.errors import LosaError, RecipeError
from losa.recipe.machines import DistributedConfig

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
# A collective of gloo gives up after so many times distributed.timeout: the watch, which names processes, comes first,
# and a process with little to do may wait for one with much.
_PATIENCE = 2
# Seconds in which a process that cannot start tries to tell the others.
_TELLING = 60.0


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
    # Where a connection breaks, NCCL's own watchdog would abort the process. The watch over the processes ends it
    # instead, once it knows which process is lost. torchrun sets the variable.
    if os.environ.get("WORLD_SIZE", "1").strip() != "1":
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    with heeding_signals():
        own_device = start_processes(device, config)
        with watched(Limits(progress=config.timeout)):
            check_same_start({**settings, "launched": {"distributed.mode": as_launched(config).mode}})
            check_config(config, process_count(), on_main(lambda: launched().local_count))
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
    return device


def end_together(problem: str) -> None:
    """Tell the other processes, which are about to join, why this one cannot go on. Process 0 waits for them.

    Raises:
        LosaError: in every process, with ``problem``; none where the others cannot be told.
    """
    try:
        if not joined() and (place := read_place()) is not None and place.count > 1:
            join(place, "", problem, timedelta(), limit=_TELLING)
    except LosaError as error:
        if problem in str(error):
            raise


def _own_device(device: str, kind: str, place: Place | None) -> str:
    if kind == "cpu":
        return device
    if place is None or place.count == 1:
        number = device.removeprefix("cuda:")
        if number.isdecimal() and int(number) < torch.cuda.device_count():
            torch.cuda.set_device(int(number))  # shards are on the current device
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
    work with; or torchrun for restarts that could not work."""
    for variable, message in _ENGINES.items():
        if _is_on(variable):
            raise LosaError(f"distributed: {message}")
    for variable, name in _PARALLEL.items():
        size = os.environ.get(variable, "1").strip()
        if size not in ("", "0", "1"):
            raise LosaError(f"distributed: {name} is not supported ({variable}={size}); set distributed.mode: fsdp")
    machines, restarts = (os.environ.get(name, "0") for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if kept_by_launcher() and machines not in ("0", "1") and restarts != "0":
        raise LosaError(
            f"distributed: with --max-restarts {restarts} on {machines} machines torchrun would give new processes the "
            "store of the dead ones; launch with --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or with "
            "--max-restarts 0"
        )
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
