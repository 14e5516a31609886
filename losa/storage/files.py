"""Files and directories that are written whole or not at all: under a temporary name first, renamed at the end."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from losa import __version__
from losa.errors import OutputError, reason

# A directory that losa wrote holds one of these files: the output of a run, a packed checkpoint, anything else.
RECORD = "losa_config.json"
MANIFEST = "losa_packed.json"
MARKER = "losa_output.json"
MARKERS = (RECORD, MANIFEST, MARKER)

# safetensors raises its own error in place of OSError: "... I/O error: No space left on device (os error 28)".
WRITE_ERRORS = (OSError, SafetensorError)

_LEFTOVER = re.compile(r"\.(.+)\.(partial|old)-(\d+)")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OutputError (disk full, no permission), naming the path."""
    with staged_file(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``. The file that the body leaves on the disk under it takes the place of
    ``path`` when the body ends well, and is removed when the body fails. Raises OutputError as ``writing``."""
    temporary = _beside(path, "partial")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write within the context (disk full, no permission) into an OutputError that names ``path``."""
    try:
        yield
    except WRITE_ERRORS as error:
        raise OutputError(f"cannot write {path}: {reason(error)}") from error


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, data) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_ours(directory: Path, markers: tuple[str, ...] = MARKERS) -> bool:
    """Whether losa wrote the directory, or the directory is empty. Then ``--overwrite`` may replace it."""
    return any((directory / name).is_file() for name in markers) or not any(directory.iterdir())


def check_output(final: Path, overwrite: bool, force: bool = False) -> None:
    """Find out before any work whether the directory ``final`` can be written at the end.

    Leftovers of processes that died are cleaned up first: partial outputs are removed, and an old output that was about
    to be replaced is restored.

    Args:
        overwrite: replace a directory that losa wrote.
        force: replace any directory.

    Raises:
        OutputError: ``final`` exists (an empty directory is fine) and ``overwrite`` is off, or losa did not write it
            and ``force`` is off; it is a file, or holds the current or the home directory; or its parent cannot be
            written to.
    """
    final = Path(final)
    try:
        place = final.resolve()
        _check_place(final, place, overwrite, force)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null byte in the name
        raise OutputError(f"output {final}: cannot write in {final.parent} ({reason(error)})") from error


def _check_place(final: Path, place: Path, overwrite: bool, force: bool) -> None:
    with suppress(FileNotFoundError):
        os.stat(_beside(place, "partial"))  # raises if the longest name that will be needed is too long
    recover(place)
    if not place.exists():
        return
    if not place.is_dir():
        raise OutputError(f"output {final}: expected a directory, found a file")
    for inside, what in ((os.getcwd(), "the current"), (os.path.expanduser("~"), "your home")):
        if Path(inside).resolve().is_relative_to(place):
            raise OutputError(f"output {final}: holds {what} directory; give the output a directory of its own")
    if force or not any(place.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"output {final}: exists; give another directory or --overwrite")
    if not is_ours(place):
        raise OutputError(
            f"output {final}: exists, and losa did not write it (it has no {', '.join(MARKERS[:-1])} or {MARKER}); "
            "give another directory, or --force to replace it all the same"
        )


def check_apart(final: Path, source: Path) -> None:
    """Raises OutputError if ``final`` is or holds ``source``, a directory that is read: writing would destroy it."""
    if Path(source).resolve().is_relative_to(Path(final).resolve()):
        raise OutputError(f"output {final}: holds {source}, which overwriting would destroy; give another directory")


@contextmanager
def staged_directory(final: Path, overwrite: bool = False, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside ``final``. It takes the place of ``final`` when the body ends well, and is
    removed when the body fails (Ctrl-C included). An old ``final`` stays until the new one is complete and on the disk.
    A directory that holds none of ``MARKERS`` gets ``MARKER``.

    Raises:
        OutputError: as ``check_output``, or a write failed; names ``final`` and the reason.
    """
    check_output(final, overwrite, force)
    place = Path(final).resolve()
    staged = _beside(place, "partial")
    try:
        staged.mkdir()
        yield staged
        if not any((staged / name).is_file() for name in MARKERS):
            write_json(staged / MARKER, {"losa_version": __version__})
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


def partial_name(final: Path) -> Path:
    """The temporary name of a directory that several processes write together: known to all of them, on whichever
    machine they are. Only processes of one run, which has claimed its output, may write it. 0 is no process's number:
    ``recover`` removes a leftover for whoever has claimed the output."""
    return final.with_name(f".{final.name}.partial-0")


def publish(final: Path) -> None:
    """Give a directory its name, from ``partial_name``, once all of it is on the disk. A directory of that name is
    removed first. Raises OutputError."""
    staged = partial_name(final)
    with writing(final):
        _sync(staged)
        if final.exists():
            remove_directory(final)
        os.replace(staged, final)
        _sync_directory(final.parent)


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


def remove_directory(path: Path) -> None:
    """Remove a directory. It is renamed first, so that a half-removed directory never has its name."""
    aside = _beside(path, "partial")
    with writing(path):
        os.replace(path, aside)
    _remove(aside)


def _remove(path: Path) -> None:
    """Remove a directory with its contents, or a file, or a link but not its target. Ignores what cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def recover(place: Path, claimed: bool = False) -> None:
    """Clean up after dead processes that wrote ``place``, a file or directory: remove partial ones, restore an old
    one.

    Args:
        claimed: no other process works here (``losa.storage.lock``), so that whoever wrote is dead. Otherwise the
            number in a leftover's name says who wrote it, which means nothing for a process of another machine.
    """
    for path in place.parent.glob(glob.escape(f".{place.name}.") + "*"):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or found[1] != place.name:
            continue
        if not claimed and _is_another_process(int(found[3])):
            continue
        if found[2] == "old" and not place.exists():
            os.replace(path, place)
        else:
            _remove(path)


def recover_all(directory: Path) -> None:
    """``recover`` every file and directory inside ``directory``, which is claimed, at any depth."""
    for path in list(directory.rglob(".*")):
        if found := _LEFTOVER.fullmatch(path.name):
            recover(path.with_name(found[1]), claimed=True)


def _is_another_process(pid: int) -> bool:
    """Whether a process of that number lives and is not this one. In containers numbers are often used again."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True
