"""Runs a worker in several processes: ``python -m tests.helpers.forks PROCESSES WORKER ARGUMENTS``. PROCESSES like
"2,3" runs it in two processes, then in three.

They are forks of this process, so that torch, transformers and losa are imported once.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import socket
import sys
import traceback

PRELOADED = ("torch.distributed.fsdp", "torch.distributed.tensor", "transformers.models.llama", "losa.run.pipeline")


def start(rank: int, processes: int, port: int, worker: str, arguments: list[str]) -> int:
    """The number of a new process, which runs the worker and ends."""
    if child := os.fork():
        return child
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, processes, processes, "127.0.0.1", port)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    sys.argv = [worker, *arguments]
    try:
        runpy.run_path(worker, run_name="__main__")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(1)  # a worker ends by itself


def run_group(processes: int, worker: str, arguments: list[str]) -> bool:
    """Whether all processes ended well. When one fails, all are ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {start(rank, processes, port, worker, arguments) for rank in range(processes)}
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
    sizes, worker, *arguments = sys.argv[1:]
    for name in PRELOADED:
        importlib.import_module(name)
    # Garbage collections of the processes leave out what was imported.
    gc.freeze()
    ended = all(run_group(int(size), worker, arguments) for size in sizes.split(","))
    sys.stderr.flush()
    os._exit(not ended)  # nanobind would list all that is frozen


if __name__ == "__main__":
    main()
