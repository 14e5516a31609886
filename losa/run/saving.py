"""When a method's rounds are saved, and going on from the newest state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from losa.distributed.processes import is_main
from losa.distributed.stop import Stopped, agree
from losa.distributed.watch import progress
from losa.errors import OutputError
from losa.recipe.machines import CheckpointConfig
from losa.record import RoundRecord
from losa.run.random_state import random_state, set_random_state
from losa.run.restoring import pruned_tensors, restore, trained_tensors
from losa.run.state_writing import StateWriter
from losa.run.states import Point, Stage, newest_state
from losa.training.position import Position, StepDone, TrainState
from losa.training.trainer import Trainer


@dataclass
class Resumed:
    """What an earlier process left: finished rounds; a round that is pruned; where its training stood. ``point``: when
    the state was saved; None: there was none. ``seconds``: wall time of the method until then."""

    point: Point | None = None
    done: list[RoundRecord] = field(default_factory=list)
    pruned: RoundRecord | None = None
    start: TrainState | None = None
    seconds: float = 0.0


class Saver:
    """Saves and restores the rounds of one method: the model's masks, weights, adapters and trained norms, AdamW's
    moments, records, and the random generators. All processes call every function together.

    Args:
        method: its name, for messages.
        directory: of the states.
        model: wrapped.
        trainer: of the rounds; None: they only prune.
        owner: what the states belong to (``losa.run.documents.belonging``).
        config: the recipe's section.
        measured_once: the engine's, saved and put back as well.
    """

    def __init__(
        self,
        method: str,
        directory: Path,
        model: nn.Module,
        trainer: Trainer | None,
        owner: dict,
        config: CheckpointConfig,
        measured_once: dict[str, Tensor] | None = None,
    ):
        self.method = method
        self.directory = directory
        self.model = model
        self.trainer = trainer
        self.owner = owner
        self.config = config
        self.measured_once = {} if measured_once is None else measured_once
        self._writer = StateWriter(directory, config.keep)
        self._base: tuple[int, dict] | None = None  # of which round, and how later states name it
        self._began = time.monotonic()
        self._saved = (self._began, 0)  # when, and at which step of all rounds

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """At the end of the context nothing is being written any more."""
        try:
            yield
            self._writer.wait()
        except BaseException:
            with suppress(Exception):  # it would hide the first error
                self._writer.wait()
            raise

    def save(
        self, stage: Stage, records: list[RoundRecord], train: TrainState | None = None, background: bool = False
    ) -> None:
        """Save the last one of ``records`` and all before it.

        Args:
            train: where its training stands.
            background: go on while the files are written.

        Raises:
            OutputError: as ``StateWriter.write``.
        """
        point = Point(records[-1].index, stage, 0 if train is None else train.position.step)
        progress(f"{self.method}: saving {point.name}")
        base = self._base[1] if self._base is not None and self._base[0] == point.round else None
        tensors = trained_tensors(self.model) | ({} if train is None else train.moments)
        if base is None:
            tensors |= pruned_tensors(self.model, self.measured_once)
            assert not background  # later states name its checksum
        document = {
            **self.owner,
            "state": {
                "rounds": [asdict(record) for record in records],
                "position": None if train is None else vars(train.position),
                "global_step": self._global_step,
                "seconds": time.monotonic() - self._began,
            },
            "random": random_state(),
            "base": base,
        }
        self._writer.write(point, tensors, document, background)
        if base is None:
            # The main process alone knows the checksum: it writes the documents.
            self._base = point.round, {"name": point.name, "checksum": document.get("checksum")}
        self._saved = time.monotonic(), self._global_step

    @property
    def _global_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    def after_step(self, done: StepDone, records: list[RoundRecord]) -> None:
        """Save after a training step, if the recipe or a signal asks for it.

        Raises:
            Stopped: in all processes, after saving, if a signal asked one of them.
            OutputError: as ``save``.
        """
        progress(f"{self.method}: step {done.global_step}")
        # A save waits for the one before, and so raises its error in all processes.
        asked = agree(self._is_due(done.global_step) or self.failed)
        if asked.save:
            background = self.config.asynchronous and asked.stop is None
            self.save(Stage.TRAINING, records, done.state(), background)
        if asked.stop is not None:
            raise Stopped(asked.stop, saved=True)

    @property
    def failed(self) -> bool:
        """Whether this process knows that a state could not be written in the background."""
        return self._writer.failed

    def _is_due(self, step: int) -> bool:
        when, at = self._saved
        if self.config.every_steps is not None and step - at >= self.config.every_steps:
            return True
        minutes = self.config.every_minutes
        # Clocks differ; that of the main process decides for all.
        return minutes is not None and is_main() and time.monotonic() - when >= 60 * minutes

    def resume(self) -> Resumed:
        """Put the newest state, if there is one, into model, trainer and random generators.

        Raises:
            OutputError: as ``newest_state`` and ``restore``, or another version of losa wrote the state.
        """
        state = newest_state(self.directory, self.owner)
        if state is None:
            return Resumed()
        try:
            found = state.document["state"]
            records = [RoundRecord(**record) for record in found["rounds"]]
            position = None if found["position"] is None else Position(**found["position"])
            step, seconds = found["global_step"], found["seconds"]
        except (KeyError, TypeError) as error:
            message = "was written by another version of losa; go on with that one, or --overwrite"
            raise OutputError(f"checkpoints in {self.directory}: {message}") from error
        moments = restore(self.model, state, self.measured_once)
        set_random_state(state.document["random"])
        if self.trainer is not None:
            self.trainer.global_step = step
        self._saved = time.monotonic(), step
        self._began -= seconds
        self._base = state.point.round, state.as_base
        if state.point.stage is Stage.DONE:
            return Resumed(state.point, records, seconds=seconds)
        start = None if position is None else TrainState(position, moments)
        return Resumed(state.point, records[:-1], records[-1], start, seconds)
