"""What training writes down step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from losa.errors import LosaError, OutputError, reason
from losa.storage.files import write_bytes, writing

METRICS = "metrics.jsonl"


class Metrics:
    """metrics.jsonl, one whole line per step, and TensorBoard scalars where asked for. Without a directory: nothing."""

    def __init__(self, directory: Path | None, tensorboard: bool):
        self.directory = directory
        self._writer_class: Any = None
        self._file: Any = None
        self._writer: Any = None
        if directory is None:
            return
        self._path, self._board = directory / METRICS, directory / "tensorboard"
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                message = "train.tensorboard: TensorBoard is not installed; pip install tensorboard, or set it to false"
                raise LosaError(message) from error
            self._writer_class = SummaryWriter
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def open(self, global_step: int) -> Iterator[None]:
        """Within the context files are open, and hold no step after ``global_step`` but the ones written."""
        if self.directory is None:
            yield
            return
        _drop_later_steps(self._path, global_step)
        with writing(self._path):
            # Unbuffered: a line that could not be written must not be tried again when the file is closed.
            self._file = self._path.open("ab", buffering=0)
        try:
            if self._writer_class is not None:
                with writing(self._board):
                    self._writer = self._writer_class(str(self._board), purge_step=global_step + 1)
            yield
        except BaseException:
            with suppress(OutputError):  # it would hide the first error, of which it may be a consequence
                self._close()
            raise
        self._close()

    def write(self, *, step: int, **values) -> None:
        if self._file is not None:
            line = memoryview(json.dumps({"step": step, **values}).encode() + b"\n")
            with writing(self._path):
                while line:  # a disk that is nearly full takes a part of it
                    line = line[self._file.write(line) :]
        if self._writer is not None:
            with writing(self._board):
                for name, value in values.items():
                    self._writer.add_scalar(f"train/{name}", value, step)

    def _close(self) -> None:
        file, writer = self._file, self._writer
        self._file = self._writer = None
        try:
            if writer is not None:
                with writing(self._board):
                    writer.close()
        finally:
            with writing(self._path):
                file.close()


def _drop_later_steps(path: Path, global_step: int) -> None:
    """Of an interrupted round that is about to be repeated, remove the lines; and any that is cut or broken."""
    if not path.exists():
        return
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {reason(error)}") from error
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= global_step]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))


def _step(line: bytes) -> float:
    """The step of a line of metrics; infinity of what is no such line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf
