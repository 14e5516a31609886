"""Runs that are killed at random moments and go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, environment


def killed(directory: Path, processes: int, kills: int) -> dict:
    """One process imports everything and computes nothing. For each attempt it forks processes that go on with the
    run, and kills one of them at a moment that is drawn from the time that an uninterrupted run takes; the watch must
    end the others. A run that gets through is compared, and the next one begins, until there were so many kills; the
    last run is left to end. A state is written after each of the five steps, in the background, so that many kills fall
    into the writing."""
    arguments = [str(directory), str(processes), str(kills), "0"]
    command = [sys.executable, "-m", "tests.helpers.workers.killing", *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["runs"] >= 1, found
    expected = (directory / "whole" / "result.json").read_text()
    for run in range(found["runs"]):
        assert (directory / str(run) / "result.json").read_text() == expected
    return found


@pytest.mark.subprocess
def test_thirty_kills_change_no_bit(tmp_path):
    assert killed(tmp_path, 1, 30)["while writing"] >= 3


@pytest.mark.subprocess
def test_kills_of_one_of_two_processes_change_no_bit(tmp_path):
    killed(tmp_path, 2, 5)
