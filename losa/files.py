"""Writing without leaving halves behind: temporary name first, rename at the end."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from losa.errors import OutputError

# safetensors has no OSError of its own: "... I/O error: No space left on device (os error 28)".
WRITE_ERRORS = (OSError, SafetensorError)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OutputError (disk full, no permission), naming the path."""
    path = Path(path)
    temporary = _beside(path, "partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, data) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def reason(error: BaseException) -> str:
    """What a failed write says to a user: the system's words, without Python's."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_output(final: Path, overwrite: bool) -> None:
    """Find out before any work whether the directory ``final`` can be written at the end.

    What processes that died left behind is cleaned up first: partial outputs go, and an old output that was about to
    be replaced comes back.

    Raises:
        OutputError: ``final`` exists (an empty directory is fine) and ``overwrite`` is off; it is a file, or holds the
            current or the home directory; or its parent cannot be written to.
    """
    final = Path(final)
    place = final.resolve()
    _recover(place)
    if place.exists():
        if not place.is_dir():
            raise OutputError(f"output {final}: expected a directory, found a file")
        for inside, what in ((os.getcwd(), "the current"), (os.path.expanduser("~"), "your home")):
            if Path(inside).resolve().is_relative_to(place):
                raise OutputError(f"output {final}: holds {what} directory; give the output a directory of its own")
        if not overwrite and any(place.iterdir()):
            raise OutputError(f"output {final}: exists; give another directory or --overwrite")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise OutputError(f"output {final}: cannot write in {place.parent} ({reason(error)})") from error


@contextmanager
def staged_directory(final: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside ``final`` that takes its place when the body ends well and is removed when it
    does not (Ctrl-C included). An old ``final`` stays until the new one is complete and on the disk.

    Raises:
        OutputError: as ``check_output``, or a write failed; names ``final`` and the reason.
    """
    check_output(final, overwrite)
    place = Path(final).resolve()
    staged = _beside(place, "partial")
    try:
        staged.mkdir()
        yield staged
        _sync(staged)
        _swap(staged, place)
    except WRITE_ERRORS as error:
        raise OutputError(f"output {final}: {reason(error)}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def _swap(staged: Path, place: Path) -> None:
    aside = _beside(place, "old")
    try:
        if place.exists():
            os.replace(place, aside)
        os.replace(staged, place)
    except BaseException:
        if aside.exists() and not place.exists():
            os.replace(aside, place)
        raise
    _sync_directory(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        if path.is_dir():
            _sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a directory; the rename is still atomic there.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _recover(place: Path) -> None:
    for path in place.parent.glob(glob.escape(f".{place.name}.") + "*"):
        found = re.fullmatch(r"(partial|old)-(\d+)", path.name.removeprefix(f".{place.name}."))
        if found is None or _is_another_process(int(found[2])):
            continue
        if found[1] == "old" and not place.exists():
            os.replace(path, place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    """A live process other than this one: in containers a number often comes back."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
