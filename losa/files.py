"""Writing without leaving halves behind: temporary name first, rename at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from losa.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError (disk full, no permission), naming the path."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def check_output(final: Path, overwrite: bool) -> None:
    """Find out before any work whether ``final`` can be written at the end.

    Raises OutputError: it exists (an empty directory is fine) and ``overwrite`` is off, or its parent is not writable.
    """
    if final.exists() and not overwrite and not (final.is_dir() and not any(final.iterdir())):
        raise OutputError(f"output {final}: exists; give another directory or --overwrite")
    parent = final.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".losa-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"output {final}: cannot write in {parent} ({error.strerror or error})") from error


@contextmanager
def staged_directory(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside ``final`` that takes its place when the body ends well and is removed when it
    does not (Ctrl-C included). What processes that died left behind is cleaned up.

    Raises OutputError: ``final`` exists and ``overwrite`` is off, or a write failed.
    """
    check_output(final, overwrite)
    _clean_stale(final)
    staged = final.parent / f".{final.name}.partial-{os.getpid()}"
    try:
        staged.mkdir()
        yield staged
        _sync(staged)
        aside = None
        if final.exists():
            aside = final.parent / f".{final.name}.old-{os.getpid()}"
            os.replace(final, aside)
        os.replace(staged, final)
        if aside is not None:
            shutil.rmtree(aside)
    except OSError as error:
        raise OutputError(f"output {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _clean_stale(final: Path) -> None:
    for path in final.parent.glob(f".{final.name}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
