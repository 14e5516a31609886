"""Result files say which machine and which code they are about."""

from __future__ import annotations

import subprocess

import pytest
import torch

from benchmarks import _machine


@pytest.fixture
def checkout(tmp_path):
    """A git repository with code and a result file."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "benchmarks" / "results" / "rows.json").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path, git("rev-parse", "--short=10", "HEAD")


@pytest.mark.subprocess
def test_the_commit_of_a_checkout(checkout):
    root, commit = checkout
    assert _machine.commit(root) == commit
    (root / "benchmarks" / "results" / "rows.json").write_text("2")
    (root / "notes.txt").write_text("untracked")
    assert _machine.commit(root) == commit, "neither is code that is measured"
    (root / "code.py").write_text("2")
    assert _machine.commit(root) == f"{commit}+changes"


@pytest.mark.subprocess
def test_a_copy_without_git(checkout, monkeypatch):
    """It may lie inside another repository, which says nothing about it."""
    copy = checkout[0] / "copy"
    copy.mkdir()
    assert _machine.commit(copy) is None
    monkeypatch.setattr(_machine, "commit", lambda: None)
    assert set(_machine.origin()) == {"losa", "date"}
    monkeypatch.undo()
    (copy / "COMMIT").write_text("0123456789\n")
    assert _machine.commit(copy) == "0123456789"


def test_rows_of_an_earlier_run_keep_their_commit(monkeypatch):
    monkeypatch.setattr(_machine, "commit", lambda: "b")
    assert _machine.origin()["commit"] == "b"
    assert _machine.origin({"commit": "a"})["commit"] == "a, b"
    assert _machine.origin({"commit": "a, b"})["commit"] == "a, b"
    assert _machine.origin({})["commit"] == "unknown, b", "an older file did not say which commit was measured"


def test_machines(monkeypatch):
    here = _machine.machine("cpu")
    assert {"device", "threads", "torch", "triton", "python", "capability", "losa_cpu"} == set(here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(_machine, "driver", lambda: "580.1")
    gpu = _machine.machine("cuda")
    assert (gpu["device"], gpu["driver"], gpu["cpu"]) == ("NVIDIA H200", "580.1", here["device"]) and "cuda" in gpu
    assert _machine.card_name() == "nvidia-h200"
    assert _machine.differences({"torch": "1", "gone": 1}, {"torch": "2", "new": 1}) == ["torch 1 / 2"]
    assert _machine.differences({"torch": "1", "losa_cpu": None}, {"torch": "1", "losa_cpu": "avx2"}) == []
