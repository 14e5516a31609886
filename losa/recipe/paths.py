"""Where a run writes, and what can be a path at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from losa.errors import shown


def output_path(path: Path) -> Path:
    """Where a run may write, with ~ resolved. Raises ValueError for what cannot be a directory's name."""
    try:
        path = path.expanduser()
        # While the output is written it has other names beside its own; this is the longest of them.
        beside = path.with_name(f".{path.name}.partial-{2**22}")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"not a directory's name: {shown(str(path))} ({error})") from error
    check_name(str(beside), str(path))
    return path


def work_path(output: Path) -> Path:
    """Where a run keeps unfinished work."""
    return output.with_name(f"{output.name}.work")


def check_name(path: str, said: str) -> None:
    """Raises ValueError for a path that no system call takes (too long, with a NUL, not encodable). The message quotes
    ``said`` in its place."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{error.strerror}: {shown(said)}") from error
    except ValueError as error:
        raise ValueError(f"not a path: {shown(said)} ({error})") from error


def check_outside(output: Path, inputs: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError for an input that lies where the output or its unfinished work will be. ``inputs``: each
    setting, and its value, which may be a path."""
    for key, name in inputs:
        path = os.path.expanduser(name)
        try:
            check_name(path, name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        for place in (output, work_path(output)):
            if os.path.exists(path) and Path(path).resolve().is_relative_to(place.resolve()):
                raise ValueError(f"output: {str(place)!r} holds {key} {name!r}, which overwriting would destroy")
