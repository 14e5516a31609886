"""Runs that are killed at random moments and go on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment


@pytest.mark.subprocess
def test_thirty_kills_change_no_bit(tmp_path):
    """One process imports everything and computes nothing. For each attempt it forks a process that goes on with the
    run, and kills that at a moment that is drawn from the time that an uninterrupted run takes. A run that gets through
    is compared, and the next one begins, until there were 30 kills; the last run is left to end. A state is written
    after each of the five steps, in the background, so that many kills fall into the writing."""
    command = [sys.executable, "-m", "tests.helpers.workers.killing", str(tmp_path), "30", "0"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 30 and found["runs"] >= 1, found
    expected = (tmp_path / "whole" / "result.json").read_text()
    for run in range(found["runs"]):
        assert (tmp_path / str(run) / "result.json").read_text() == expected
