"""The directory of a run's unfinished work beside its output, and the one process that works there."""

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

from losa import __version__
from losa.errors import OutputError
from losa.files import check_output, is_ours, reason, recover, recover_all, remove_directory, write_json, writing
from losa.recipe import Recipe
from losa.record import RunRecord
from losa.report import RECORD

logger = logging.getLogger("losa")

MARKER = "work.json"


class Workspace:
    """``OUTPUT.work``: results of finished methods, checkpoints of finished rounds, metrics.

    Before the output gets its name the record that it will hold is written here too: a later process then knows
    whether the output that it finds is this run's.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = output.parent / f"{output.name}.work"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within the context no other process can claim the same output.

        A lock of the system on a file beside the output: it ends with the process, however that ends. On file systems
        without locks there is a warning and no lock.

        Raises:
            OutputError: another process has it; says which. Or the file cannot be written.
        """
        try:
            place = self.output.resolve()
            path = place.with_name(f".{place.name}.lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(path, self.output)
        except (OSError, RuntimeError, ValueError) as error:  # a circle of links, no name
            message = f"output {self.output}: cannot write in {self.output.parent} ({reason(error)})"
            raise OutputError(message) from error
        try:
            if descriptor is not None:
                with writing(path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
            yield
        finally:
            if descriptor is not None:
                # Removed while it is locked: who opened it before finds out that it has no name any more.
                with suppress(OSError):
                    path.unlink()
                os.close(descriptor)

    def open(self, recipe: Recipe, *, resume: bool, overwrite: bool, force: bool) -> RunRecord | None:
        """Make the directory ready for the run; the record of an output that is complete already, where ``resume``
        finds one: of this run, whose work is then removed, or of another one by the same recipe.

        Raises:
            OutputError: as ``check_output``; there is unfinished work and neither ``resume`` nor ``overwrite``; or
                something that losa did not make has the directory's name.
        """
        recover(self.path)
        exists = self.path.exists()
        if exists and not (self.path.is_dir() and is_ours(self.path, (MARKER,))):
            if not (force and self.path.is_dir()):
                hint = "; move it away" + (", or --force to replace it" if self.path.is_dir() else "")
                raise OutputError(f"output: {self.path} is needed for unfinished work, but losa did not make it{hint}")
            remove_directory(self.path)
            exists = False
        if exists:
            recover_all(self.path)
        if resume and (record := self._finished(recipe, overwrite)) is not None:
            if exists:
                remove_directory(self.path)
            return record
        check_output(self.output, overwrite, force)
        if exists and not resume and not overwrite and self.worth_keeping():
            raise OutputError(
                f"output: unfinished work in {self.path}; continue it with --resume or discard with --overwrite"
            )
        if exists and not (resume and self.worth_keeping()):
            remove_directory(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output: cannot create {self.path} ({reason(error)})") from error
        write_json(self.path / MARKER, {"losa_version": __version__, "output": str(self.output)})
        return None

    def worth_keeping(self) -> bool:
        """Whether a method or a round is finished."""
        results = (path for path in self.path.glob("*.json") if path.name not in (MARKER, RECORD))
        return any(results) or any(self.path.glob("*/checkpoints/round-*"))

    @contextmanager
    def kept_if_worth_it(self) -> Iterator[None]:
        """Remove the directory when the body fails and nothing in it is worth keeping."""
        try:
            yield
        except BaseException:
            with suppress(OSError, OutputError):
                if self.path.is_dir() and not self.worth_keeping():
                    remove_directory(self.path)
            raise

    def expect(self, record: RunRecord) -> None:
        """Note the record that the output will hold."""
        write_json(self.path / RECORD, record.to_dict())

    def close(self) -> None:
        """Remove the directory: the output is complete."""
        with suppress(OutputError):
            remove_directory(self.path)

    def _finished(self, recipe: Recipe, overwrite: bool) -> RunRecord | None:
        try:
            found = (self.output / RECORD).read_bytes()
            record = RunRecord.from_dict(json.loads(found))
            if self.path.exists():
                return record if found == (self.path / RECORD).read_bytes() else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        wanted = recipe.model_dump(mode="json")
        same = {k: v for k, v in record.recipe.items() if k != "output"} == {
            k: v for k, v in wanted.items() if k != "output"
        }
        return record if same and not overwrite else None


def _lock(path: Path, output: Path) -> int | None:
    """An open, locked descriptor of the file ``path``; None where the file system has no locks."""
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
        # The one before removed it between the opening and the lock.
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
