"""For ``tests/losa/run/test_killing.py``: runs that are killed, in forks of a process that has imported everything."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from losa.storage.files import recover_all, write_json
from tests.helpers.rounds import method_run, result

RESULT = "result.json"


def run(directory: Path) -> None:
    """Go on with the run in this directory, as ``losa run --resume`` does, and write down its result."""
    directory.mkdir(parents=True, exist_ok=True)
    recover_all(directory)
    one = method_run(directory, sequences_in_all=10, train={"round_share": 0.4})
    write_json(directory / RESULT, result(one, one.run(resume=True)))


def fork(directory: Path) -> int:
    """The number of a new process, which does ``run``."""
    if child := os.fork():
        return child
    try:
        run(directory)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def ends_within(child: int, seconds: float) -> bool:
    """Whether the process ends by itself within this time. Raises RuntimeError if it fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            if status:
                raise RuntimeError(f"a run ended with status {status}")
            return True
        time.sleep(0.001)
    return False


def main(directory: Path, kills: int, seed: int) -> dict:
    # A fork has one thread: what another thread held locked would stay locked in it.
    assert len(os.listdir("/proc/self/task")) == 1
    began = time.monotonic()
    assert ends_within(fork(directory / "whole"), 100)
    needed = time.monotonic() - began
    moments = random.Random(seed)
    found = {"kills": 0, "while writing": 0, "runs": 0}
    while True:
        place = directory / str(found["runs"])
        child = fork(place)
        if ends_within(child, moments.uniform(0, needed) if found["kills"] < kills else 100):
            found["runs"] += 1
            if found["kills"] == kills:
                return found
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found["kills"] += 1
        found["while writing"] += any(place.rglob(".*.partial-*"))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
