"""What all processes of a run must have alike before any work: code, settings, and the file system of the output."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import losa_kernels
from losa import __version__
from losa.distributed.processes import from_everyone, on_main, process_count
from losa.errors import LosaError, OutputError, reason, shown
from losa_kernels import native
from losa_kernels import settings as variables

# Seconds until a file of another host is seen: NFS clients may keep what they know of a directory for half a minute.
_VISIBLE = 40.0
_POLL = 0.2
# Beside torch, what a run's numbers or files come from.
_PACKAGES = ("transformers", "tokenizers", "accelerate", "safetensors", "datasets")


def check_same_start(settings: Mapping[str, Any]) -> None:
    """Make sure that all processes run the same code with the same settings, each on a GPU of its own.

    Args:
        settings: plain nested data, such as a recipe's.

    Raises:
        LosaError: in every process; names what differs, and in which process.
    """
    if process_count() == 1:
        return
    own = {
        "install the same on every machine": _code(),
        "start all processes with the same recipe and options": json.loads(json.dumps(settings)),
        "set the same in every process": _variables(),
    }
    found = from_everyone((own, _gpu()))
    first_with: dict[tuple[str, str], int] = {}
    for index, (_, gpu) in enumerate(found):
        if gpu is not None and (earlier := first_with.setdefault(gpu, index)) != index:
            raise LosaError(
                f"processes {earlier} and {index} (host {gpu[0]}) have the same GPU; start as many processes on a "
                "machine as it has GPUs, and let each see its own or all of them"
            )
    for index, (theirs, _) in enumerate(found):
        for advice, of_others in theirs.items():
            if differs := _first_difference(found[0][0][advice], of_others):
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


def _code() -> dict[str, Any]:
    versions = {"losa": __version__, "losa's source files": _source_digest(), "torch": torch.__version__}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    loaded = {f"native code for {kind} is loaded": native.missing(kind) is None for kind in native.LIBRARIES}
    return {**versions, **loaded, "native code": (native.build_info() or {}).get("version")}


def _variables() -> dict[str, str]:
    """The environment variables that choose kernels."""
    chosen = (s.name for s in variables.TABLE if s.read in (variables.EVERY_CALL, variables.FIRST_CALL))
    return {name: os.environ.get(name, "").strip().lower() for name in chosen}


def _gpu() -> tuple[str, str] | None:
    """The host and the identifier of the GPU that this process works on."""
    if "nccl" not in dist.get_backend_config():
        return None
    return socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


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
        OutputError: in every process: the main process cannot write there, or names the processes that see nothing.
    """
    if process_count() == 1:
        return
    token = directory / f".shared-{on_main(lambda: uuid.uuid4().hex)}"

    def write() -> None:
        try:
            token.touch()
        except OSError as error:
            raise OutputError(f"output: cannot write into {directory}: {reason(error)}") from error

    on_main(write)
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
