"""What all processes of a run must have alike before any work: code, settings, and the file system of the output."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import losa_kernels
from losa import __version__
from losa.distributed.processes import from_everyone, on_main, process_count
from losa.errors import LosaError, OutputError, shown

# Seconds until a file of another host is seen: NFS clients may keep what they know of a directory for half a minute.
_VISIBLE = 40.0
_POLL = 0.2


def check_same_start(settings: Mapping[str, Any]) -> None:
    """Make sure that all processes run the same code with the same settings.

    Args:
        settings: plain nested data, such as a recipe's.

    Raises:
        LosaError: in every process; names what differs, and in which process.
    """
    if process_count() == 1:
        return
    code = {"losa": __version__, "losa's source files": _source_digest(), "torch": torch.__version__}
    found = from_everyone((code, json.loads(json.dumps(settings))))
    for index, (their_code, their_settings) in enumerate(found):
        for first, theirs, advice in (
            (found[0][0], their_code, "install the same on every machine"),
            (found[0][1], their_settings, "start all processes with the same recipe and options"),
        ):
            if differs := _first_difference(first, theirs):
                name, of_first, other = differs
                raise LosaError(f"{name}: process {index} has {other}, process 0 has {of_first}; {advice}")


def _first_difference(first: Any, other: Any, name: str = "") -> tuple[str, str, str] | None:
    """The dotted name of the first value that differs in nested dictionaries, and the two values as text."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            inner = f"{name}.{key}" if name else key
            if found := _first_difference(first.get(key), other.get(key), inner):
                return found
        return None
    return None if first == other else (name, shown(first), shown(other))


def _source_digest() -> str:
    """SHA-256 over the Python files of losa and losa_kernels, cut short."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(losa_kernels.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def check_shared(directory: Path, wait: float = _VISIBLE) -> None:
    """Make sure that every process sees what the main process writes into a directory, which exists there.

    Args:
        wait: seconds until a process gives up.

    Raises:
        OutputError: in every process; names the processes that see nothing.
    """
    if process_count() == 1:
        return
    token = directory / f".shared-{on_main(lambda: uuid.uuid4().hex)}"
    on_main(token.touch)
    seen = from_everyone((_appears(token, wait), socket.gethostname()))
    on_main(lambda: token.unlink(missing_ok=True))
    blind = [f"process {index} (host {host})" for index, (there, host) in enumerate(seen) if not there]
    if blind:
        raise OutputError(
            f"output: {', '.join(blind)} cannot see what process 0 (host {seen[0][1]}) writes into {directory}; the "
            "output belongs on a file system that all of them share"
        )


def _appears(file: Path, wait: float) -> bool:
    began = time.monotonic()
    while True:
        # To list a directory asks the server, where a look at a name may be answered from what was known before.
        with suppress(OSError):
            if any(entry.name == file.name for entry in file.parent.iterdir()):
                return True
        if time.monotonic() - began > wait:
            return False
        time.sleep(_POLL)
