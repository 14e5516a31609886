"""For ``tests/losa/run/test_killing.py``: runs that are killed, in forks of a process that has imported everything."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from losa.distributed.processes import is_main, on_main
from losa.distributed.watch import LOST_EXIT_CODE, Limits, watched
from losa.errors import LosaError
from losa.storage.files import recover_all, write_json
from tests.helpers.rounds import method_run, result

RESULT = "result.json"
LIMITS = Limits(progress=60, period=0.2, silent=5, broken=1, grace=0.5)


def run(directory: Path, rank: int, processes: int, port: int) -> None:
    """Go on with the run in this directory, as ``losa run --resume`` does, and write down its result."""
    if processes > 1:
        where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": processes}
        dist.init_process_group("gloo", timeout=timedelta(seconds=60), **where)
    with watched(LIMITS):
        (directory / f"joined-{rank}").touch()
        on_main(lambda: recover_all(directory))
        one = method_run(directory, sequences_in_all=10 * processes, train={"round_share": 0.4})
        found = result(one, one.run(resume=True))
        if is_main():
            write_json(directory / RESULT, found)


def start(directory: Path, processes: int) -> set[int]:
    """The numbers of new processes, which do ``run``; they have joined."""
    directory.mkdir(parents=True, exist_ok=True)
    signs = [directory / f"joined-{rank}" for rank in range(processes)]
    for sign in signs:
        sign.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {fork(directory, rank, processes, port) for rank in range(processes)}
    deadline = time.monotonic() + 60
    while not all(sign.exists() for sign in signs):
        if time.monotonic() > deadline:
            raise RuntimeError("the processes do not join")
        time.sleep(0.001)
    return children


def fork(directory: Path, *where: int) -> int:
    if child := os.fork():
        return child
    try:
        run(directory, *where)
        os._exit(0)
    except LosaError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


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


def main(directory: Path, processes: int, kills: int, seed: int) -> dict:
    # A fork has one thread: what another thread held locked would stay locked in it.
    assert len(os.listdir("/proc/self/task")) == 1
    children, began = start(directory / "whole", processes), time.monotonic()
    assert set(ended(children, 100).values()) == {0}
    needed = time.monotonic() - began
    moments = random.Random(seed)
    found = {"kills": 0, "while writing": 0, "runs": 0}
    while True:
        place = directory / str(found["runs"])
        children = start(place, processes)
        codes = ended(children, moments.uniform(0, needed) if found["kills"] < kills else 100)
        if any(codes.values()):
            raise RuntimeError(f"a run ended with {codes}")
        if len(codes) == processes:
            found["runs"] += 1
            if found["kills"] == kills:
                return found
            continue
        victim = moments.choice(sorted(children - codes.keys()))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        found["kills"] += 1
        found["while writing"] += any(place.rglob(".*.partial-*"))
        others = children - codes.keys() - {victim}
        codes = ended(others, 60)
        if len(codes) < len(others) or not {*codes.values()} <= {0, LOST_EXIT_CODE}:
            raise RuntimeError(f"beside a process that was killed the others ended with {codes}")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
