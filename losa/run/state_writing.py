"""Writing a resume state: every process writes its part, the main process gives the whole its name."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.futures
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from losa.distributed.processes import is_main, joined
from losa.distributed.watch import others_wait
from losa.errors import OutputError
from losa.run.documents import write_document
from losa.run.states import FOR_FILES, METADATA, STATE, Point, naming, remove_outdated, unhurried
from losa.storage.files import file_digest, partial_name, publish

# A process that is alone is not told at each save that it is alone.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class StateWriter:
    """Writes the states of one method. All processes call every function together.

    Tensors are plain ones, which all processes have alike and one of them writes, or DTensors, of which each process
    writes its rows.

    Args:
        directory: of the states, on a file system that all processes share.
        keep: how many states stay (``remove_outdated``).
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self.keep = keep
        self._group: Any = None
        self._future: Future | None = None
        self._final = directory

    def write(self, point: Point, tensors: dict[str, Tensor], document: dict, background: bool = False) -> None:
        """Write a state, and remove outdated ones. A state that is still being written is waited for first.

        Args:
            document: JSON, with ``base`` (``State.as_base``) of the state that holds masks and weights; None: this one.
                In the main process it gets checksums.
            background: return when the tensors are copied to host memory; ``wait`` for the end.

        Raises:
            OutputError: disk full, no permission, or the processes do not share the file system; of this state, or of
                the one before. Nothing half-written has a state's name.
        """
        self.wait()
        self._final = self.directory / point.name
        files = _Files(self._final, document, self.keep)
        if background:
            # The group is this thread's own: messages of training and of a save must not meet.
            if self._group is None and joined():
                self._group = dist.new_group(backend="gloo", timeout=FOR_FILES)
            # With a storage writer that copies, as DCP's does, the copies are made before this returns.
            self._future = dcp.async_save(tensors, storage_writer=files, process_group=self._group)  # type: ignore
            return
        with others_wait(), self._cleaning(), naming(self._final), unhurried() as group:
            dcp.save(tensors, storage_writer=files, process_group=group)

    @property
    def failed(self) -> bool:
        """Whether this process knows that the state written in the background could not be written."""
        future = self._future
        return future is not None and future.done() and future.exception() is not None

    def wait(self) -> None:
        """Wait until the state that is written in the background has its name. Raises OutputError as ``write``."""
        future = self._future
        if future is not None:
            with others_wait(), self._cleaning(), naming(self._final):
                try:
                    future.result()
                finally:
                    if future.done():
                        self._future = None

    @contextmanager
    def _cleaning(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # After Ctrl-C a thread may still write here.
            if is_main() and self._future is None:
                shutil.rmtree(partial_name(self._final), ignore_errors=True)
            raise


class _Written(list[WriteResult]):
    """What one process has written, and SHA-256 by file. DCP hands it to the main process."""

    digests: dict[str, str]


class _Files(dcp.FileSystemWriter):
    """DCP's files, under a temporary name until all of them and the document are on the disk."""

    def __init__(self, final: Path, document: dict, keep: int):
        super().__init__(partial_name(final))
        self.final, self.document, self.keep = final, document, keep

    def write_data(self, plan, planner) -> torch.futures.Future[list[WriteResult]]:
        written = _Written(super().write_data(plan, planner).value())
        names = {result.storage_data.relative_path for result in written}
        written.digests = {name: file_digest(Path(self.path) / name) for name in sorted(names)}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(written)
        return future

    def finish(self, metadata, results) -> None:
        """Called in the main process, when all processes have written their files."""
        super().finish(metadata, results)
        staged = Path(self.path)
        digests: dict[str, str] = {}
        for process, written in enumerate(results):
            for name in written.digests:
                if not (staged / name).is_file():
                    raise OutputError(
                        f"checkpoint {self.final}: process {process} wrote a file of it that process 0 does not find; "
                        "the output belongs on a file system that all processes share"
                    )
            digests |= written.digests
        digests[METADATA] = file_digest(staged / METADATA)
        self.document["sha256"] = digests
        self.document["checksum"] = write_document(staged / STATE, self.document)
        publish(self.final)
        remove_outdated(self.final, self.keep)
