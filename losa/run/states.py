"""Resume states on disk: which there are, read back, checked, and the old ones removed.

A method's states are directories in ``OUTPUT.work/METHOD/checkpoints``: ``round-02-pruned`` after a round's pruning,
``round-02-step-00000120`` within its training, ``round-02`` at its end. Each holds ``state.json`` and tensors in the
format of torch.distributed.checkpoint (DCP). The first state of a round holds masks and replaced weights. The later
states of the round hold adapters and AdamW's moments, and name the first one, their base.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from losa.distributed.joining import as_patient, patience
from losa.distributed.processes import (
    control_group,
    from_everyone,
    is_main,
    joined,
    on_main,
    process_count,
    process_index,
)
from losa.distributed.watch import others_wait, progress
from losa.errors import LosaError, OutputError, reason
from losa.run.documents import DAMAGE, check_belonging, read_document
from losa.storage.files import file_digest, remove_directory

logger = logging.getLogger("losa")

CHECKPOINTS, STATE = "checkpoints", "state.json"
METADATA = ".metadata"  # where DCP writes which tensors there are
_NAME = re.compile(r"round-(\d+)(?:-(pruned)|-step-(\d+))?")
# How long a process may write and read files while others wait for it.
FOR_FILES = timedelta(days=1)
_EARLIER = "layers.safetensors"  # the tensors of a state before DCP


class Stage(IntEnum):
    """How far a round has come, in this order."""

    PRUNED = 0
    TRAINING = 1
    DONE = 2


class Point(NamedTuple):
    """When a state was saved. Points are ordered as the run passes them. ``step``: of the round's training."""

    round: int
    stage: Stage
    step: int = 0

    @property
    def name(self) -> str:
        """Of the state's directory."""
        ends = {Stage.PRUNED: "-pruned", Stage.TRAINING: f"-step-{self.step:08d}", Stage.DONE: ""}
        return f"round-{self.round:02d}{ends[self.stage]}"

    @classmethod
    def of(cls, path: Path) -> Point | None:
        """Of a state's directory; None for any other file."""
        found = _NAME.fullmatch(path.name)
        if found is None:
            return None
        stage = Stage.PRUNED if found[2] else Stage.TRAINING if found[3] else Stage.DONE
        return cls(int(found[1]), stage, int(found[3] or 0))


@dataclass(frozen=True)
class State:
    """A state whose documents are sound. ``base``: the directory of masks and weights, perhaps the same.

    ``files``: SHA-256 by file of tensors, of both directories.
    """

    path: Path
    base: Path
    document: dict
    files: dict[Path, str]

    @property
    def point(self) -> Point:
        point = Point.of(self.path)
        assert point is not None
        return point

    @property
    def as_base(self) -> dict:
        """How a later state of this round names its base."""
        return self.document["base"] or {"name": self.path.name, "checksum": self.document["checksum"]}


def state_paths(directory: Path) -> list[Path]:
    """Directories of states, oldest first. A partial one has another name."""
    found = {point: path for path in directory.glob("round-*") if (point := Point.of(path))}
    return [found[point] for point in sorted(found)]


def read_state(path: Path) -> State:
    """A state's documents, its base's among them.

    Raises:
        OutputError: an earlier version of losa wrote it.
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: damaged (``DAMAGE``).
    """
    if (path / _EARLIER).exists():
        what = f"checkpoint {path}: was written by an earlier version of losa"
        raise OutputError(f"{what}; go on with that one, or --overwrite")
    document = read_document(path / STATE)
    files = {path / name: digest for name, digest in document["sha256"].items()}
    if document["base"] is None:
        return State(path, path, document, files)
    base = path.with_name(document["base"]["name"])
    found = read_document(base / STATE)
    if found["checksum"] != document["base"]["checksum"]:
        raise ValueError(f"{base.name}, which it needs, is another one than when it was written")
    return State(path, base, document, files | {base / name: digest for name, digest in found["sha256"].items()})


def readable_states(directory: Path) -> tuple[list[State], list[str]]:
    """The states whose documents are sound, newest first, and a sentence for each state whose documents are not.

    Raises:
        OutputError: an earlier version of losa wrote one.
    """
    readable: list[State] = []
    damage: list[str] = []
    for path in reversed(state_paths(directory)):
        try:
            readable.append(read_state(path))
        except DAMAGE as error:
            damage.append(_damaged(path, reason(error)))
    return readable, damage


def newest_state(directory: Path, wanted: dict) -> State | None:
    """The newest state that is sound, the same in all processes, which call it together and share out the hashing.

    A damaged state is passed over, with a warning, for the one before it. The main process alone lists the directory:
    on a network file system another machine may see the list of half a minute ago.

    Args:
        wanted: what it must belong to (``losa.run.documents.belonging``).

    Returns:
        None where there is no state.

    Raises:
        OutputError: in every process. It belongs to another recipe, model or data; every state is damaged; an earlier
            version of losa wrote it; or a process does not find the files of the main process.
    """
    readable, damage = on_main(partial(readable_states, directory))
    for sentence in damage:
        _warn(sentence)
    for state in readable:
        check_belonging(f"checkpoint {state.path}", state.document, wanted)
        _check_found(directory / state.path.name / STATE)
        wrong = _damaged_file(state)
        if wrong is None:
            return state
        damage.append(_damaged(state.path, wrong))
        _warn(damage[-1])
    if damage:
        raise OutputError(f"{damage[0]}, and none before it can be read; --overwrite starts afresh")
    return None


def _damaged(path: Path, why: str) -> str:
    return f"checkpoint {path}: damaged ({why})"


def _warn(sentence: str) -> None:
    if is_main():
        logger.warning(sentence)


def _check_found(path: Path) -> None:
    """Raises OutputError, in every process, if one of them does not find a file that the main process has read."""
    blind = [str(index) for index, found in enumerate(from_everyone(_opens(path))) if not found]
    if blind:
        raise OutputError(
            f"checkpoint {path.parent}: process {', '.join(blind)} does not find the {path.name} that process 0 has "
            "read; the output belongs on a file system that all processes share"
        )


def _opens(path: Path) -> bool:
    try:
        path.open("rb").close()  # to open a file asks the server of a network file system
    except OSError:
        return False
    return True


def _damaged_file(state: State) -> str | None:
    """What is wrong with the files of tensors, found by all processes together; None where nothing is."""
    progress(f"checking {state.path.name}")
    wrong = None
    with others_wait():
        for path, digest in list(state.files.items())[process_index() :: process_count()]:
            try:
                if file_digest(path) != digest:
                    wrong = f"{path.name} has another checksum than when it was written"
            except OSError as error:
                wrong = f"{path.name}: {reason(error)}"
    with unhurried():
        return next((one for one in from_everyone(wrong) if one is not None), None)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of one directory of a state. Reads a pickle: only of files whose checksums are right."""
    stored: Any = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in stored.items()}


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, plain or DTensors, by name from one directory of a state. All processes call it together.

    Raises:
        OutputError: the files cannot be read.
    """
    with others_wait(), naming(path), unhurried() as group:
        dcp.load({**tensors}, storage_reader=dcp.FileSystemReader(path), process_group=group)


@contextmanager
def unhurried() -> Iterator[Any]:
    """The group that files' messages go through, None for a process that is alone. Within the context a process waits
    for the slowest one however long its files take; the watch over the processes tells who is lost."""
    group = control_group() if joined() else None
    if group is None or patience() is None:
        yield group
        return
    dist.distributed_c10d._set_pg_timeout(FOR_FILES, group)
    try:
        yield group
    finally:
        as_patient(group)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn DCP's errors, which hold the errors of all processes, into one that names the state and the process.

    Raises:
        OutputError: a file could not be written or read, in any of the processes.
    """
    try:
        yield
    except CheckpointException as failed:
        process, (error, _) = min(failed.failures.items())
        if isinstance(error, LosaError) or not isinstance(error, Exception):  # Ctrl-C is no error of writing
            raise error from None
        where = f"process {process}: " if process_count() > 1 else ""
        raise OutputError(f"checkpoint {path}: {where}{reason(error)}") from error


def remove_outdated(newest: Path, keep: int) -> None:
    """Leave ``newest``, which has just been written, ``keep`` - 1 states before it, and whatever they need.

    States after ``newest`` are damaged ones that were passed over. With ``keep`` above 1 a state of an earlier round
    stays too: all states of a round need the same file of masks.
    """
    paths = {point: path for path in state_paths(newest.parent) if (point := Point.of(path))}
    last = next(point for point, path in paths.items() if path == newest)
    before = sorted((point for point in paths if point <= last), reverse=True)
    kept = set(before[:keep])
    if keep > 1 and len({point.round for point in kept}) == 1:
        kept.update([point for point in before if point.round < last.round][:1])
    kept |= {Point(point.round, Stage.PRUNED) for point in kept}
    for point in sorted(paths.keys() - kept, reverse=True):  # whatever needs a base goes before the base
        with suppress(OutputError):
            remove_directory(paths[point])
