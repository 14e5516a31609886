"""Several processes for a test, forked from one that has imported everything: to import torch and transformers takes
longer than what a test does. Also the program that forks: ``python -m tests.helpers.forks MODULE SIZES ARGUMENTS``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.processes import OUTPUT, ROOT, environment


def fork_workers(
    module: str, sizes: list[int], directory: Path, *arguments: str, timeout: float = 200
) -> dict[int, list[Any]]:
    """Run ``module.main(*arguments)`` in groups of processes, one group after the other. ``main`` begins with
    ``start_worker`` and ends with ``finish``.

    Args:
        sizes: processes of each group.
        directory: takes the results.
        timeout: of each group, in seconds. A process that waits for ever shows where shortly before.

    Returns:
        by size, what each process gave to ``finish``, in the order of the processes.
    """
    extra = environment(**{OUTPUT: str(directory), "LOSA_TEST_TIMEOUT": str(timeout - 10)})
    command = [sys.executable, "-m", "tests.helpers.forks", module, ",".join(map(str, sizes)), *arguments]
    done = subprocess.run(command, env=extra, cwd=ROOT, capture_output=True, text=True, timeout=timeout * len(sizes))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {n: [json.loads((directory / str(n) / f"{i}.json").read_text()) for i in range(n)] for n in sizes}


def fork_group(main: Any, size: int, arguments: list[str]) -> bool:
    """Whether all processes of a group ended well. After a failure the others are ended."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    directory = Path(os.environ[OUTPUT]) / str(size)
    directory.mkdir(parents=True)
    children = set()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), OUTPUT: str(directory)}
                main(*arguments)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(1)  # ``finish`` has ended a process that was done
        children.add(child)
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:
                os.kill(other, 9)
            return False
    return True


if __name__ == "__main__":
    _, name, sizes, *arguments = sys.argv
    main = importlib.import_module(name).main
    # The processes' garbage collections do not look at what was imported.
    gc.collect()
    gc.freeze()
    ended = all(fork_group(main, int(size), arguments) for size in sizes.split(","))
    sys.stderr.flush()
    os._exit(0 if ended else 1)
