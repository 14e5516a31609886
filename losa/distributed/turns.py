"""Work that is done in each process, on each machine, or by one process after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from losa.distributed.processes import from_everyone, launched, process_count, process_index
from losa.distributed.sharding import whole
from losa.distributed.together import together
from losa.distributed.watch import others_wait, progress, waiting

# Seconds between two looks at whether the first processes of all machines are done.
_POLL = 0.05

_T = TypeVar("_T")
_calls = itertools.count()


def everywhere(work: Callable[[], _T]) -> _T:
    """``together``, for results that cannot be pickled: this process's own result."""
    results: list[_T] = []
    together(lambda: results.append(work()))
    return results[0]


def on_each_machine(work: Callable[[], object]) -> None:
    """Run ``work``, which may take hours, in the first process of every machine. Every process waits for all of them,
    without a time limit, in the processes' key-value store. Raises as ``together``."""
    if process_count() == 1:
        work()
        return
    first = launched().local_index == 0
    store: Any = dist.distributed_c10d._get_default_store()
    number = next(_calls)
    workers = [index for index, works in enumerate(from_everyone(first)) if works]

    def work_and_wait() -> None:
        try:
            if first:
                with others_wait():
                    work()
        finally:
            if first:
                store.set(f"losa/machines/{number}/{process_index()}", "")
            with waiting():
                while not store.check([f"losa/machines/{number}/{index}" for index in workers]):
                    time.sleep(_POLL)

    together(work_and_wait)


def by_turns(tensors: Mapping[str, Tensor], work: Callable[[str, Tensor], _T]) -> dict[str, _T]:
    """What ``work`` gives for every tensor with all its rows, and for the tensor's name. Each process works on every
    N-th tensor, in a thread beside the gathering of other tensors, and holds at most three whole tensors.

    All processes call it with the same names in the same order, and get all results, which can be pickled.
    """
    mine: dict[str, Future[_T]] = {}
    last: Future[_T] | None = None
    with ThreadPoolExecutor(1) as pool:
        for index, (name, tensor) in enumerate(tensors.items()):
            progress(f"gathering {name}")
            full = whole(tensor)
            if index % process_count() == process_index():
                if last is not None:
                    last.exception()  # waits; the error is raised below
                last = mine[name] = pool.submit(work, name, full)
    found = together(lambda: {name: future.result() for name, future in mine.items()})
    everything = {name: result for part in found for name, result in part.items()}
    return {name: everything[name] for name in tensors}
