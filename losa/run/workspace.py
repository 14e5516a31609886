"""The directory of a run's unfinished work, beside its output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from losa import __version__
from losa.distributed.processes import process_count
from losa.errors import OutputError, reason
from losa.recipe.paths import work_path
from losa.recipe.sections import Recipe
from losa.record import RunRecord
from losa.storage.files import RECORD, check_output, is_ours, recover, recover_all, remove_directory, write_json

MARKER = "work.json"
BLOCKS = "blocks"  # in a method's directory: pruned blocks of an offloaded model


class Workspace:
    """``OUTPUT.work``: results of finished methods, resume states, metrics. Who opens it has claimed the output.

    Before the output gets its name, the record that it will hold is written here as well. A later process then knows
    whether the output that it finds came of this work.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = work_path(output)

    def open(self, recipe: Recipe, *, resume: bool, overwrite: bool, force: bool) -> RunRecord | None:
        """Make the directory ready for the run. Work from which an output was made already is removed.

        Returns:
            the record of a complete output by the same recipe, where ``resume`` finds one; else None.

        Raises:
            OutputError: as ``check_output``; or there is unfinished work and neither ``resume`` nor ``overwrite``; or
                something that losa did not make, or may not read or write, has the directory's name.
        """
        try:
            return self._open(recipe, resume, overwrite, force)
        except OSError as error:
            raise OutputError(f"output: cannot work in {self.path} ({reason(error)})") from error

    def _open(self, recipe: Recipe, resume: bool, overwrite: bool, force: bool) -> RunRecord | None:
        for place in (self.output.resolve(), self.path):
            recover(place, claimed=True)
        recover(self.path / MARKER, claimed=True)  # a process that died while it wrote the marker left no other sign
        exists = self.path.exists()
        if exists and not (self.path.is_dir() and is_ours(self.path, (MARKER,))):
            if not (force and self.path.is_dir()):
                hint = "; move it away" + (", or --force to replace it" if self.path.is_dir() else "")
                raise OutputError(f"output: {self.path} is needed for unfinished work, but losa did not make it{hint}")
            remove_directory(self.path)
            exists = False
        if exists:
            recover_all(self.path)
        if done := exists and self._is_done():
            remove_directory(self.path)
            exists = False
        # Work that is still there belongs to an output still to come.
        if resume and not exists and (done or not overwrite) and (record := self._finished(recipe)) is not None:
            return record
        check_output(self.output, overwrite, force)
        if exists and resume and self._work(offloaded=recipe.offload is None):
            other = "without" if recipe.offload else "with"
            raise OutputError(
                f"output: unfinished work in {self.path} was begun {other} offload: disk; go on so, or --overwrite"
            )
        if exists and not resume and not overwrite and self.worth_keeping():
            raise OutputError(
                f"output: unfinished work in {self.path}; continue it with --resume or discard with --overwrite"
            )
        processes = process_count()
        if exists and resume and self.worth_keeping():
            processes = self.processes()
        elif exists:
            remove_directory(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path / MARKER, {"losa_version": __version__, "output": str(self.output), "processes": processes}
        )
        return None

    def processes(self) -> int:
        """How many processes the run began with.

        Raises:
            OutputError: an earlier version of losa, which did not write it down, made the directory.
        """
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads((self.path / MARKER).read_bytes())["processes"])
        raise OutputError(
            f"output: unfinished work in {self.path} was made by another version of losa; go on with that one, or "
            "--overwrite"
        )

    def worth_keeping(self) -> bool:
        """Whether there is a result of a method, or a state to go on from."""
        results = (path for path in self.path.glob("*.json") if path.name not in (MARKER, RECORD))
        return any(results) or any(map(self._work, (False, True)))

    def _work(self, offloaded: bool) -> list[Path]:
        """What a run that offloads the model keeps of a method, or any other run."""
        return list(self.path.glob(f"*/{BLOCKS}/*.json" if offloaded else "*/checkpoints/round-*"))

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

    def _is_done(self) -> bool:
        """Whether the output that is there was made from this work."""
        try:
            return (self.output / RECORD).read_bytes() == (self.path / RECORD).read_bytes()
        except OSError:
            return False

    def _finished(self, recipe: Recipe) -> RunRecord | None:
        """The output's record, if its recipe is the same up to the output's place."""
        try:
            record = RunRecord.from_dict(json.loads((self.output / RECORD).read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        place = {"output": None}
        return record if record.recipe | place == recipe.model_dump(mode="json") | place else None
