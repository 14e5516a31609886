"""Processes that join each other, forked from one that has imported torch: each costs milliseconds.

A test starts one Python for its worker, which imports what all cases need, calls ``run_cases`` and so prints what every
process of every case said and how it ended.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.helpers.forks import fork, place, reserved
from tests.helpers.processes import ROOT

# Seconds. Every limit of a case is much shorter.
HANGS = 120


@dataclass
class Case:
    """``work`` runs in ``count`` processes at once and is given the number of each. ``variables`` replaces environment
    variables of a process; None removes one. ``frozen``: the process that never ends and is killed at the end."""

    work: Callable[[int], object]
    count: int = 2
    variables: Callable[[int], dict[str, str | None]] = field(default=lambda index: {})
    frozen: int | None = None


def run_cases(cases: dict[str, Case]) -> None:
    """Run all cases at the same time. Prints JSON: for each case a list of each process's exit code, output (what it
    said, and what ``work`` returned) and seconds."""
    found = {name: [{} for _ in range(case.count)] for name, case in cases.items()}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        ports = {name: held.enter_context(reserved()).getsockname()[1] for name in cases}
        began, running = time.monotonic(), {}
        for name, case in cases.items():
            for index in range(case.count):
                variables = place(index, case.count, ports[name]) | case.variables(index)
                pid = fork(partial(_work, case, index), variables, Path(folder) / f"{name}-{index}")
                running[pid] = (name, index)
        while running:
            for pid, (name, index) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    said = (Path(folder) / f"{name}-{index}").read_text()
                    code = os.waitstatus_to_exitcode(status)
                    found[name][index] = {"code": code, "said": said, "seconds": time.monotonic() - began}
                    del running[pid]
                elif cases[name].frozen == index and sum(other == name for other, _ in running.values()) == 1:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    print(json.dumps(found))


def _work(case: Case, index: int) -> int:
    """In the new process: its exit code."""
    # A process that hangs says where, and ends.
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        print("returned", case.work(index), flush=True)
        return 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return getattr(error, "exit_code", 1)


def outcomes(worker: str, folder: Path, timeout: float = 300) -> dict[str, list[dict]]:
    """What ``run_cases`` of a worker's text found."""
    (folder / "worker.py").write_text(worker)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "LOSA_JOIN", "TORCH_NCCL"))}
    # Warnings of torch, such as of a host name that cannot be found, would stand among what is compared.
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "worker.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
