"""Several processes for a test: a worker, a module of ``tests.helpers.workers``, runs many cases in one go.

Its ``main`` begins with ``start_worker()`` and ends with ``finish(results)``; the test gets what every process found.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTPUT = "LOSA_TEST_OUTPUT"


def environment(**extra: str) -> dict[str, str]:
    """What a process of a test starts with: one thread, no GPU, this tree's packages."""
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    # glibc else keeps freed pieces of some megabytes, more or fewer as it happens, and peaks of memory count them.
    fixed["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    return os.environ | fixed | extra


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The command that starts ``arguments`` (a file, or "-m" and a module) in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, *arguments]


def run_workers(worker: str, processes: int, directory: Path, *arguments: str, timeout: float = 200) -> list[Any]:
    """Run a worker in so many processes.

    Args:
        worker: the module's name.
        directory: takes the results.
        arguments: of the worker's ``main``.
        timeout: in seconds. A worker that waits for ever shows where shortly before.

    Returns:
        what each process gave to ``finish``, in the order of the processes.
    """
    return run_groups(worker, [processes], directory, *arguments, timeout=timeout)[processes]


def run_groups(
    worker: str, sizes: list[int], directory: Path, *arguments: str, timeout: float = 200
) -> dict[int, list[Any]]:
    """``run_workers`` for one number of processes after the other, which is faster than to call it for each: the
    results by the number of processes. ``timeout``: of each group."""
    for size in sizes:
        (directory / str(size)).mkdir(parents=True)
    output = directory / "said"
    output.touch()
    extra = environment(**{OUTPUT: str(directory), "LOSA_TEST_TIMEOUT": str(timeout - 10)})
    request = {"worker": worker, "sizes": sizes, "arguments": arguments, "environment": extra, "output": str(output)}
    well = _ask(json.dumps(request), timeout * len(sizes))
    assert well, output.read_text()[-8000:]
    return {n: [json.loads((directory / f"{n}/{i}.json").read_text()) for i in range(n)] for n in sizes}


# The process that forks, for all tests of this process: to import torch, transformers and losa takes seconds.
_forking: list[subprocess.Popen] = []


def _ask(request: str, timeout: float) -> bool:
    """Whether all processes that the request asks for end well, in so many seconds."""
    if not _forking:
        command = [sys.executable, "-m", "tests.helpers.forks"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _forking.append(subprocess.Popen(command, env=environment(), cwd=ROOT, text=True, process_group=0, **pipes))
    server = _forking[0]
    server.stdin.write(request + "\n")
    server.stdin.flush()
    answered, _, _ = select.select([server.stdout], [], [], timeout)
    if answered and (status := server.stdout.readline()):
        return status == "0\n"
    # It hangs, or has ended.
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    _forking.clear()
    return False


def start_worker() -> None:
    """The first call of a worker: joins the processes, and shows every thread's place if the worker hangs."""
    import torch.distributed as dist

    faulthandler.dump_traceback_later(float(os.environ["LOSA_TEST_TIMEOUT"]), exit=True)
    dist.init_process_group("gloo")


def finish(results: Any) -> None:
    """The last call of a worker: hands ``results`` (JSON-able) to the test and ends the process."""
    import torch.distributed as dist

    path = Path(os.environ[OUTPUT]) / os.environ["WORLD_SIZE"] / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
    # gloo's threads, torn down with the interpreter, abort one run in some thirty.
    os._exit(0)
