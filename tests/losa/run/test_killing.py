"""Runs that are killed at random moments and go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.processes import run_workers
from tests.helpers.workers.killing import PLAN, RESULT


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict[int, dict]]:
    """For each attempt a process forks others that go on with the run, and kills one of them at a moment that is drawn
    from most of the time that an uninterrupted run takes, or, every other time, when a state is next written; the watch
    must end the others, and each says which process was lost. A run that gets through is compared, and the next one
    begins, until there were so many kills; the last run is left to end. A state is written after each of the five
    steps, in the background."""
    directory = tmp_path_factory.mktemp("killed")
    (found,) = run_workers("killing", 1, directory / "found", str(directory), "0", timeout=290)
    return directory, {int(count): each for count, each in found.items()}


@pytest.mark.subprocess
@pytest.mark.parametrize("processes", PLAN)
def test_thirty_kills_change_no_bit(killed, processes):
    """Of two processes that hold the model in shards, and of a process that is alone."""
    directory, found = killed[0] / str(processes), killed[1][processes]
    assert sum(PLAN.values()) == 30 and found["kills"] == PLAN[processes] and found["runs"] >= 1
    assert found["while writing"] >= PLAN[processes] // 2
    # A process may have done its part when the other one is killed.
    assert found["named"] >= (processes - 1) * PLAN[processes] / 2
    expected = (directory / "whole" / RESULT).read_text()
    for run in range(found["runs"]):
        assert (directory / str(run) / RESULT).read_text() == expected
