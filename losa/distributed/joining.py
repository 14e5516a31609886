"""How processes find each other: the launcher's variables, the key-value store that they share, and who has come.

Every process says in the store that it has come, or why it cannot go on, before any of them waits in a collective. So
whatever is wrong ends all of them with the same sentence.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from losa.errors import LosaError, reason
from losa_kernels import settings

_POLL = 0.1
# Seconds that process 0, which may keep the store, leaves to the others at least to read why the job ends.
_GRACE = 5.0
_HOW = "start the processes with torchrun, or with srun as examples/slurm does"
# How the store says that all may go on.
_GO = "go"
# What launchers of MPI set.
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """What the launcher gave to this process: its number among ``count`` processes and among those of its machine, how
    many its machine has, and where process 0 or the launcher keeps the store."""

    index: int
    count: int
    local_index: int
    local_count: int
    host: str
    port: int

    @property
    def store(self) -> str:
        return f"{self.host}:{self.port} (MASTER_ADDR, MASTER_PORT)"


ALONE = Place(0, 1, 0, 1, "localhost", 0)


# How long a collective waits, once the processes have joined.
_patience: list[timedelta] = []


def read_place() -> Place | None:
    """The launcher's variables, as torchrun sets them; None for a process that was started alone.

    Raises:
        LosaError: names the variable that is missing or has a bad value.
    """
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1").strip() == "1":
        if mpi := next((name for name in _MPI if os.environ.get(name, "1").strip() not in ("", "1")), None):
            raise LosaError(f"RANK: expected RANK and WORLD_SIZE of a launcher, found {mpi} of MPI; {_HOW}")
        return None
    count = _number("WORLD_SIZE", 1, 2**20)
    index = _number("RANK", 0, count - 1)
    local_count = _number("LOCAL_WORLD_SIZE", 1, count) if "LOCAL_WORLD_SIZE" in os.environ else count
    local_index = _number("LOCAL_RANK", 0, local_count - 1)
    if count == 1:
        return ALONE
    host = os.environ.get("MASTER_ADDR", "").strip()
    if not host:
        raise LosaError(f"MASTER_ADDR: expected the host of process 0, is not set; {_HOW}")
    return Place(index, count, local_index, local_count, host, _number("MASTER_PORT", 1, 65535))


def _number(name: str, lowest: int, highest: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise LosaError(f"{name}: expected a number from {lowest} to {highest}, is not set; {_HOW}")
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= highest:
        raise LosaError(f"{name}: expected a number from {lowest} to {highest}, got {text!r}; {_HOW}")
    return value


def join(place: Place, device: str, problem: str | None, timeout: timedelta, limit: float | None = None) -> None:
    """Join all processes in torch's default group, which works in host memory and on the GPU.

    Args:
        device: "cpu" or "cuda", the same in every process.
        problem: why this process cannot go on.
        timeout: after which a collective gives up.
        limit: seconds from now in which this process waits for the others; default: LOSA_JOIN_TIMEOUT.

    Raises:
        LosaError: in every process: a process cannot go on, is missing, has another one's number or expects another
            number of processes; or the store cannot be reached. Process 0 raises it once every process knows why, or
            after ``limit``.
    """
    limit = limit or settings.JOIN_TIMEOUT()
    began = time.monotonic()
    store: Any = _connect(place, limit) if place.count > 1 else dist.HashStore()
    try:
        _meet(store, place, device, problem, limit, began)
    except RuntimeError as error:
        raise LosaError(
            f"process {place.index}: the processes' store at {place.store} is gone: {reason(error)}"
        ) from error
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    group_timeout = timedelta(seconds=limit)
    try:
        dist.init_process_group(backend, store=store, rank=place.index, world_size=place.count, timeout=group_timeout)
    except RuntimeError as error:
        raise LosaError(
            f"process {place.index} (host {socket.gethostname()}) cannot reach the others, although all have come: "
            f"{reason(error)}; where a machine has several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name one"
        ) from error
    _patience[:] = [timeout]
    as_patient(dist.group.WORLD)


def as_patient(group: Any) -> Any:
    """The group, whose collective calls now wait as long as ``join`` was told. New groups have limits of torch's, which
    may come before the watch over the processes names one."""
    for timeout in _patience:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return group


def patience() -> timedelta | None:
    """How long collective calls wait; None where another program has joined the processes."""
    return _patience[0] if _patience else None


def kept_by_launcher() -> bool:
    """Whether torchrun keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(place: Place, limit: float) -> Any:
    """The store that all processes share."""
    keeps = place.index == 0 and not kept_by_launcher()
    if not keeps:
        _await_listener(place, limit)
    made: list[Any] = []

    def make() -> None:
        wait = timedelta(seconds=limit)
        try:
            made.append(dist.TCPStore(place.host, place.port, place.count, keeps, wait, wait_for_workers=False))
        except RuntimeError as error:
            made.append(error)

    # A listener that is no store may never answer, and the constructor would never return.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(limit)
    if not made or isinstance(made[0], RuntimeError):
        why = reason(made[0]) if made else f"no answer within {limit:g} s"
        if "EADDRINUSE" in why:
            raise LosaError(f"port {place.port} on this machine is in use (MASTER_PORT); set another")
        raise LosaError(f"process {place.index}: the processes' store at {place.store} cannot be used: {why}")
    if kept_by_launcher():
        # torchrun keeps one store for all its attempts.
        return dist.PrefixStore(f"losa/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", made[0])
    return made[0]


def _await_listener(place: Place, limit: float) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=limit).close()
            return
        except OSError as error:
            if time.monotonic() - began > limit:
                raise LosaError(
                    f"process {place.index} (host {socket.gethostname()}): the main process could not be reached at "
                    f"{place.store} within {limit:g} s: {reason(error)}"
                ) from error
            time.sleep(_POLL)


def _meet(store: Any, place: Place, device: str, problem: str | None, limit: float, began: float) -> None:
    """Wait until every process has come and none has a problem, for ``limit`` seconds since ``began``."""
    me = f"host {socket.gethostname()}, pid {os.getpid()}"
    found = store.compare_set(f"losa/place/{place.index}", "", me).decode()
    if problem is not None:
        problem = f"process {place.index} ({me}): {problem}"
    elif found != me:
        problem = f"two processes have RANK={place.index}: one on {found}, one on {me}; or two jobs share {place.store}"
    else:
        problem = _differs(store, place, "WORLD_SIZE", str(place.count)) or _differs(store, place, "device", device)
    if problem is None:
        # Only now, when this process is known to expect what the first one expects: process 0 goes on by these keys.
        store.set(f"losa/fine/{place.index}", "")
    fine = [f"losa/fine/{index}" for index in range(place.count)]
    while True:
        # One key decides for all: nobody goes on where another process ends.
        outcome = problem
        if outcome is None and time.monotonic() - began > limit:
            missing = [str(index) for index, key in enumerate(fine) if not store.check([key])]
            outcome = f"of {place.count} processes these have not come within {limit:g} s: {', '.join(missing)}"
        elif outcome is None and place.index == 0 and store.check(fine):
            outcome = _GO
        if outcome is not None:
            store.compare_set("losa/outcome", "", outcome)
        if store.check(["losa/outcome"]):
            outcome = store.get("losa/outcome").decode()
            if outcome != _GO or problem is not None:
                _leave(store, place, began + limit)
                raise LosaError(problem if outcome == _GO else outcome)
            return
        time.sleep(_POLL)


def _differs(store: Any, place: Place, what: str, value: str) -> str | None:
    """What is wrong where another process has another value."""
    first, found = json.loads(store.compare_set(f"losa/{what}", "", json.dumps([place.index, value])))
    return None if found == value else f"{what}: process {place.index} has {value}, process {first} has {found}"


def _leave(store: Any, place: Place, until: float) -> None:
    """Note that this process knows why the job ends. Process 0 waits for the others, for the store may go with it: a
    process that comes later than another one, by what its imports take, reads the reason all the same."""
    with suppress(RuntimeError):  # process 0 has waited long enough
        store.add("losa/told", 1)
        until = max(until, time.monotonic() + _GRACE)
        while place.index == 0 and store.add("losa/told", 0) < place.count and time.monotonic() < until:
            time.sleep(_POLL)
