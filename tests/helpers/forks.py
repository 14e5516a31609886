"""Processes that cost a test milliseconds: forks of one that has imported what they need.

``python -m tests.helpers.forks PROCESSES WORKER ARGUMENTS`` calls ``main(*ARGUMENTS)`` of a module of
``tests.helpers.workers`` in several processes. PROCESSES like "2,3" calls it in two processes, then in three.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

# What is else imported at its first use, in each process anew.
PRELOADED = ("torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.llama", "losa.run.pipeline")


def prepare() -> None:
    """Import, before the first fork, what takes long."""
    for name in PRELOADED:
        importlib.import_module(name)
    # A fork has one thread: what another thread held locked would stay locked in it.
    assert len(os.listdir("/proc/self/task")) == 1
    # Garbage collections of the processes leave out what was imported.
    gc.freeze()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def place(rank: int, processes: int, port: int) -> dict[str, str | None]:
    """The variables that a launcher sets for a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def fork(work: Callable[[], int], variables: Mapping[str, str | None], output: Path | None = None) -> int:
    """The number of a new process, which ends with the exit code that ``work`` returns.

    Args:
        variables: of its environment; None removes one.
        output: takes all that it says; default: where this process's output goes.
    """
    if child := os.fork():
        return child
    code = 1
    try:
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if output is not None:
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_group(processes: int, work: Callable[[], int]) -> bool:
    """Whether all processes ended well. When one fails, all are ended."""
    port = free_port()
    children = {fork(work, place(rank, processes, port)) for rank in range(processes)}
    failed = False
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:
            failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    return not failed


def main() -> None:
    sizes, name, *arguments = sys.argv[1:]
    worker = importlib.import_module(f"tests.helpers.workers.{name}")
    prepare()

    def work() -> int:
        worker.main(*arguments)
        return 1  # a worker ends by itself

    ended = all(run_group(int(size), work) for size in sizes.split(","))
    sys.stderr.flush()
    os._exit(not ended)  # nanobind would list all that is frozen


if __name__ == "__main__":
    main()
