"""Processes that cost a test milliseconds: forks of one that has imported what they need.

``python -m tests.helpers.forks`` reads requests, a line of JSON each, until nobody can write one any more. It calls
``main`` of a module of ``tests.helpers.workers`` in several processes and writes a line with 0 where all ended well.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

# What workers import, and what is else imported at its first use, in each process anew.
PRELOADED = ("torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "losa.run.pipeline")


def reserved() -> socket.socket:
    """Holds a free port, on which a store may still listen: nobody else is given the port meanwhile."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", 0))
    return found


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
    failed = False
    with reserved() as held:
        port = held.getsockname()[1]
        children = {fork(work, place(rank, processes, port)) for rank in range(processes)}
        while children:
            child, status = os.wait()
            children.discard(child)
            if status and not failed:
                failed = True
                for other in children:
                    os.kill(other, signal.SIGKILL)
    return not failed


def run(worker: str, sizes: list[int], arguments: list[str]) -> int:
    """0 where all processes ended well, of one group after the other; ``sizes``: how many each group has."""
    module = importlib.import_module(f"tests.helpers.workers.{worker}")
    # Garbage collections of the processes leave out what was imported.
    gc.freeze()

    def work() -> int:
        module.main(*arguments)
        return 1  # a worker ends by itself

    return int(not all(run_group(size, work) for size in sizes))


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    # A fork has one thread: what another thread held locked would stay locked in it.
    assert len(os.listdir("/proc/self/task")) == 1
    for line in sys.stdin:
        request = json.loads(line)
        variables = dict.fromkeys(os.environ) | request["environment"]
        work = partial(run, request["worker"], request["sizes"], request["arguments"])
        _, status = os.waitpid(fork(work, variables, Path(request["output"])), 0)
        print(status, flush=True)
    os._exit(0)  # nanobind would list all that is left


if __name__ == "__main__":
    main()
