"""Which process this is, what the main process does for all, and whether all have the same."""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

import losa.errors
from losa.distributed.joining import ALONE, Place, as_patient, read_place
from losa.distributed.watch import others_wait, waiting
from losa.errors import LosaError, OutputError

# Seconds between two looks at whether the main process is done.
_POLL = 0.05

_T = TypeVar("_T")
_calls = itertools.count()

# Errors that other processes raise as what they are; each is made of its message, which Stopped and ProcessLost are
# not: work does not look for signals.
_KINDS = (ValueError, *(kind for kind in vars(losa.errors).values() if isinstance(kind, type)))


def joined() -> bool:
    """Whether the processes have joined. A process that is alone has not, unless it holds its model in shards."""
    return dist.is_available() and dist.is_initialized()


def process_count() -> int:
    """How many processes have joined; 1 without torch.distributed."""
    return dist.get_world_size() if joined() else 1


def process_index() -> int:
    """This process's number, from 0; 0 before the processes have joined."""
    return dist.get_rank() if joined() else 0


def launched() -> Place:
    """What the launcher gave to this process, for use before the processes have joined, too.

    Raises:
        LosaError: as ``read_place``.
    """
    return read_place() or ALONE


def is_main() -> bool:
    """Whether this is the process that writes and talks to the user."""
    return process_index() == 0


def on_main(work: Callable[[], _T]) -> _T:
    """Run ``work`` in the main process and return its result in every process.

    The other processes look into the processes' key-value store, without a collective: they may wait for hours, where
    a barrier would give up after its time limit, and they learn at once that the main process failed or is gone.

    Args:
        work: its result can be pickled.

    Raises:
        LosaError: in every process, where ``work`` raises one in the main process. Of another error, which the main
            process raises, such as of a result that cannot be pickled, the other processes say only that there was one.
    """
    if process_count() == 1:
        return work()
    store: Any = dist.distributed_c10d._get_default_store()
    # The name tells calls apart where one process has skipped a call: a process then waits, and takes no other result.
    key = f"losa/{next(_calls)}/{_name(work)}"
    if not is_main():
        with waiting():
            return _wait(store, key)
    try:
        with others_wait():
            result = work()
        told = pickle.dumps((None, result))
    except BaseException as error:
        failed = told_error(error) if isinstance(error, LosaError) else (None, "its own message says why")
        store.set(key, pickle.dumps((failed, None)))
        raise
    store.set(key, told)
    return result


def told_error(error: Exception) -> tuple[type[Exception] | None, str]:
    """What other processes are told of an error: the type that they raise with the message; None for a type that they
    do not raise, whose name is in the message."""
    if type(error) in _KINDS:
        return type(error), str(error)
    return None, f"{type(error).__name__}: {error}"


def _name(work: Any) -> str:
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__qualname__", type(work).__qualname__)


def _wait(store, key: str):
    try:
        while not store.check([key]):
            time.sleep(_POLL)
        failed, result = pickle.loads(store.get(key))
    except RuntimeError as error:  # the store went with the process that held it
        raise LosaError("the main process ended before its work was done; its own message says why") from error
    if failed is not None:
        kind, message = failed
        raise LosaError(f"the main process failed; {message}") if kind is None else kind(message)
    return result


def from_everyone(value: Any) -> list[Any]:
    """Every process's ``value``, in the order of the processes; it can be pickled."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    with waiting():
        dist.all_gather_object(values, value, group=control_group())
    return values


_control: list[Any] = []


def control_group() -> Any:
    """The processes' group for small messages between hosts: it works in host memory, whatever the model's device."""
    if "gloo" in dist.get_backend():
        return dist.group.WORLD
    if not _control:
        _control.append(as_patient(dist.new_group(backend="gloo")))
    return _control[0]


def check_agreement(what: str, value: str) -> None:
    """Make sure that every process has the same ``value``, of something that it read.

    Raises:
        OutputError: in every process; names two that differ and what each has.
    """
    values = from_everyone(value)
    other = next((i for i, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise OutputError(
            f"{what}: process 0 has {values[0]}, process {other} has {values[other]}; the processes must read the same "
            "files, so inputs and output belong on a file system that all of them share"
        )
