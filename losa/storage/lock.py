"""A lock, so that one process at a time works on an output."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from losa.errors import OutputError, reason
from losa.storage.files import writing

logger = logging.getLogger("losa")


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Within the context no other process can claim the same output.

    The operating system locks a file beside the output, and unlocks it when the process ends in any way. On file
    systems without locks there is a warning and no lock.

    Raises:
        OutputError: another process has claimed it (the message says which), or the file cannot be written.
    """
    try:
        place = output.resolve()
        path = place.with_name(f".{place.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, output)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, or an output without a name
        message = f"output {output}: cannot write in {output.parent} ({reason(error)})"
        raise OutputError(message) from error
    try:
        if descriptor is not None:
            with writing(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        yield
    finally:
        if descriptor is not None:
            # Removed while it is locked: a process that has opened it meanwhile sees that the name is gone.
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: Path, output: Path) -> int | None:
    """An open descriptor of the locked file ``path``; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError as error:
            who = _describe(os.pread(descriptor, 1 << 16, 0))
            os.close(descriptor)
            raise OutputError(
                f"output {output}: another process works on it ({who}); wait for it, stop it, or give another output"
            ) from error
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("%s: no locks on this file system (%s); do not start a second run", path, reason(error))
            os.close(descriptor)
            return None
        # The process that held the lock removed the file after it was opened here.
        os.close(descriptor)


def _this_process() -> dict:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def _describe(content: bytes) -> str:
    try:
        who = json.loads(content)
        return f"pid {who['pid']} on {who['host']} since {who['since']}: {who['command']}"
    except (ValueError, KeyError, TypeError):
        return "which has just started"
