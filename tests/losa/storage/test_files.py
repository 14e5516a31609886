"""Files and directories that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile

import pytest

from losa.errors import OutputError
from losa.storage.files import MARKER, check_output, staged_directory, write_json


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_existing_output_needs_overwrite(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    with staged_directory(final) as staged:
        (staged / "a").write_text("1")
    with pytest.raises(OutputError, match=r"out: exists"), staged_directory(final):
        raise AssertionError("the body must not run")
    with staged_directory(final, overwrite=True) as staged:
        assert (final / "a").read_text() == "1"
        (staged / "b").write_text("2")
    assert leftovers(final) == ["b", MARKER] and leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OutputError])
def test_failure_keeps_the_old_output(tmp_path, error):
    final = tmp_path / "out"
    write_old(final)
    with pytest.raises(error), staged_directory(final, force=True) as staged:
        (staged / "new").write_text("new")
        raise error
    assert leftovers(final) == ["old"] and leftovers(tmp_path) == ["out"]


def test_failed_rename_brings_the_old_output_back(tmp_path, monkeypatch):
    final = tmp_path / "out"
    write_old(final)
    replace = os.replace

    def fails(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OutputError, match="out.*Input/output error"), staged_directory(final, force=True) as staged:
        (staged / "new").write_text("new")
    assert leftovers(final) == ["old"] and leftovers(tmp_path) == ["out"]


def write_old(directory):
    directory.mkdir()
    (directory / "old").write_text("old")


def test_leftovers_of_dead_processes(tmp_path, dead_pid):
    alive = f".out.partial-{os.getppid()}"
    for name in (f".out.partial-{dead_pid}", f".out.partial-{os.getpid()}", alive, f".other.partial-{dead_pid}"):
        (tmp_path / name).mkdir()
    write_old(tmp_path / f".out.old-{dead_pid}")
    with pytest.raises(OutputError, match="exists"):
        check_output(tmp_path / "out", overwrite=False)
    assert leftovers(tmp_path / "out") == ["old"]
    assert leftovers(tmp_path) == sorted([f".other.partial-{dead_pid}", alive, "out"])
    write_old(tmp_path / f".out.old-{dead_pid}")
    check_output(tmp_path / "out", overwrite=True, force=True)
    assert leftovers(tmp_path) == sorted([f".other.partial-{dead_pid}", alive, "out"])


def test_check_output_finds_trouble_early(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for final, overwrite in ((tmp_path / "file", True), (tmp_path / "file" / "out", False)):
        with pytest.raises(OutputError, match="file"):
            check_output(final, overwrite)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="holds the current directory"):
        check_output(tmp_path.parent, overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with pytest.raises(OutputError, match="holds your home directory"):
        check_output(tmp_path / "home", overwrite=True)
    check_output(tmp_path / "new" / "deep" / "out", overwrite=False)
    assert leftovers(tmp_path / "new" / "deep") == []


def test_unwritable_parent_is_found_early(tmp_path, monkeypatch):
    def denied(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)  # root may write anywhere
    with pytest.raises(OutputError, match="out: cannot write in .*Permission denied"):
        check_output(tmp_path / "out", overwrite=False)


def test_output_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for text in ("1", "2"):
        with staged_directory(tmp_path / "link", overwrite=True) as staged:
            (staged / "a").write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "a").read_text() == "2"
    assert leftovers(tmp_path) == ["disk", "link"]


def test_write_json_is_whole_or_absent(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match=r"a\.json: No space left"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    assert leftovers(tmp_path) == ["a.json"]


def leftovers(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
