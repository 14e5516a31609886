"""For ``tests/losa/run/test_killing.py``: runs that are killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from losa.distributed import joining, processes
from losa.distributed.joining import join, read_place
from losa.distributed.processes import is_main, on_main
from losa.distributed.sharding import make_sharding, shard_module, sharding_of
from losa.distributed.watch import LOST_EXIT_CODE, Limits, watched
from losa.errors import LosaError
from losa.storage.files import recover_all, write_json
from tests.helpers.forks import fork, place, reserved
from tests.helpers.processes import finish
from tests.helpers.rounds import method_run, result

RESULT = "result.json"
LIMITS = Limits(progress=60, period=0.05, silent=10, broken=0.5, grace=0.5)
# How many processes, and how many of their attempts are killed.
PLAN = {2: 20, 1: 10}
# Each linear costs a run time.
PRUNE = {"targets": ["q_proj", "down_proj"]}


def go_on(directory: Path) -> None:
    """Go on with the run in this directory, as ``losa run --resume`` does, and write down its result. Several processes
    hold the model together."""
    where = read_place()
    assert where is not None
    if where.count > 1:
        join(where, "cpu", None, timedelta(seconds=60))
    with watched(LIMITS):
        (directory / f"joined-{where.index}").touch()
        on_main(lambda: recover_all(directory))
        run = method_run(
            directory, sequences_in_all=10 * where.count, layers=1, prune=PRUNE, train={"round_share": 0.4}
        )
        if where.count > 1:
            shard_module(run.model, make_sharding(torch.device("cpu")))
        outcome = run.run(resume=True)
        assert (sharding_of(run.model) is None) == (where.count == 1)
        found = result(run, outcome)
        if is_main():
            write_json(directory / RESULT, found)


def exit_code(directory: Path) -> int:
    """Of a process that goes on."""
    # The polls of a job of hours would be most of a run of a second.
    joining._POLL = processes._POLL = 0.005
    try:
        go_on(directory)
    except LosaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def said(directory: Path, rank: int) -> Path:
    return directory / f"said-{rank}"


def start(directory: Path, count: int) -> list[int]:
    """The numbers of new processes, in their order, which go on and have joined."""
    directory.mkdir(parents=True, exist_ok=True)
    signs = [directory / f"joined-{rank}" for rank in range(count)]
    for sign in signs:
        sign.unlink(missing_ok=True)
    with reserved() as held:
        port, work = held.getsockname()[1], partial(exit_code, directory)
        children = [fork(work, place(rank, count, port), said(directory, rank)) for rank in range(count)]
        deadline = time.monotonic() + 60
        while not all(sign.exists() for sign in signs):
            if time.monotonic() > deadline:
                raise RuntimeError("the processes do not join")
            time.sleep(0.001)
    return children


def ended(children: set[int], seconds: float) -> dict[int, int]:
    """The exit codes of the processes that end by themselves within this time; it does not wait longer than for all."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children - codes.keys():
            number, status = os.waitpid(child, os.WNOHANG)
            if number:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return codes


def is_written(directory: Path, since: int) -> bool:
    """Whether there is a state that is not written to its end, of an attempt that began at this time (ns)."""
    with suppress(FileNotFoundError):  # it may get its name meanwhile
        return any(file.stat().st_mtime_ns >= since for file in directory.rglob(".*.partial-0/*"))
    return False


def stop_while_writing(directory: Path, victim: int, since: int) -> bool:
    """Stop the process at a moment at which a state is written; False where the process ends before there is one."""
    # Its exit code is left for others to read.
    while not os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if is_written(directory, since):
            os.kill(victim, signal.SIGSTOP)
            if is_written(directory, since):
                return True
            os.kill(victim, signal.SIGCONT)
        time.sleep(0.0005)
    return False


def kill(directory: Path, children: list[int], victim: int, living: set[int], since: int) -> dict[str, int]:
    """Kill one of the processes that run: whether it was while a state was written, and how many others named it."""
    writing = is_written(directory, since)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    others = living - {victim}
    codes = ended(others, 60)
    # With 0: it had nothing left to do with the other process.
    if len(codes) < len(others) or not {*codes.values()} <= {0, LOST_EXIT_CODE}:
        raise RuntimeError(f"beside a process that was killed the others ended with {codes}")
    name = f"process {children.index(victim)} (host {socket.gethostname()}, pid {victim})"
    told = [said(directory, children.index(child)).read_text() for child, code in codes.items() if code]
    if not all(name in text for text in told):
        raise RuntimeError(f"{name} was killed, and others say: {told}")
    return {"kills": 1, "while writing": writing, "named": len(told)}


def runs(directory: Path, count: int, kills: int, moments: random.Random) -> dict[str, float]:
    """Runs of ``count`` processes, in directories 0, 1, ... The run in "whole" is not killed, and the last one is left
    to end."""
    children, began = start(directory / "whole", count), time.monotonic()
    if set(ended(set(children), 100).values()) != {0}:
        raise RuntimeError([said(directory / "whole", rank).read_text() for rank in range(count)])
    needed = time.monotonic() - began
    found = Counter(runs=0)
    while True:
        own, since = directory / str(found["runs"]), time.time_ns()
        children = start(own, count)
        codes = ended(set(children), moments.uniform(0, 0.7 * needed) if found["kills"] < kills else 100)
        living = set(children) - codes.keys()
        if living and not any(codes.values()):
            victim = moments.choice(sorted(living))
            # Random moments may all miss the writing, so that every other kill waits for it.
            if found["kills"] % 2 == 0 or stop_while_writing(own, victim, since):
                found.update(kill(own, children, victim, living, since))
                continue
            codes |= ended(living, 60)
        if len(codes) < count or any(codes.values()):
            raise RuntimeError(f"a run ended with {codes}: {[said(own, rank).read_text() for rank in range(count)]}")
        found["runs"] += 1
        if found["kills"] == kills:
            return {**found, "seconds": needed}


def main(directory: str, seed: str) -> None:
    """In one process, which computes nothing and forks."""
    moments = random.Random(int(seed))
    finish({count: runs(Path(directory) / str(count), count, kills, moments) for count, kills in PLAN.items()})
