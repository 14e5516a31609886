"""For ``tests/losa/run/test_resume_processes.py``: rounds that go on with another number of processes, and with another
way to hold the model."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from losa.distributed.processes import is_main
from losa.distributed.sharding import make_sharding, shard_module, whole
from losa.distributed.stop import Stopped, heeding_signals
from losa.errors import OutputError
from losa.run.documents import read_document
from losa.run.methods import MethodRun
from losa.run.saving import Saver
from losa.run.states import CHECKPOINTS, STATE, newest_state, state_paths
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.processes import finish, start_worker
from tests.helpers.rounds import losses, method_run

WEIGHTS = "weights.pt"
# How many processes; how many of them hold one model together (0: each of them the whole); at which step they are
# stopped.
Stretch = tuple[int, int, int | None]
UNINTERRUPTED, WHOLE, SHARDED = "uninterrupted", "whole, whole, sharded", "sharded, one shard, 2 x 2 shards, whole"
# As if two processes had been stopped in the first pruning, or in an earlier method, and one went on.
BEGUN = "begun by two"
# Of a mixture: experts are linears while states are written, and a stack before and after.
EXPERTS, EXPERTS_APART = "experts, uninterrupted", "experts, 2 shards, 4 shards"
CHAINS: dict[str, list[Stretch]] = {
    EXPERTS: [(2, 0, None)],
    EXPERTS_APART: [(2, 2, 5), (4, 4, None)],
    UNINTERRUPTED: [(2, 0, None)],
    BEGUN: [(1, 0, None)],
    WHOLE: [(2, 0, 5), (1, 0, 7), (4, 4, None)],
    SHARDED: [(2, 2, 6), (1, 1, 7), (4, 2, 8), (4, 0, None)],
}


def rounds(directory: Path) -> MethodRun:
    """Rounds of 2 and 8 steps."""
    return method_run(
        directory,
        model=of_kind(KINDS["Mixtral"]) if directory.name in (EXPERTS, EXPERTS_APART) else None,
        dropout=0.0,
        sequences_in_all=40,
        processes=2,
        prune={"targets": ["q_proj", "k_proj", "down_proj"]},  # each linear costs time
        train={"round_share": 0.2, "norms": 0.5},
        evaluate={"each_round": False},
        checkpoint={"every_steps": 3},
    )


def stretch(directory: Path, shard_size: int, last_step: int | None) -> MethodRun:
    """Go on, until the last process is asked to stop after ``last_step``."""
    run = rounds(directory)
    run.inputs.evaluate = lambda model: None
    if shard_size:
        shard_module(run.model, make_sharding(torch.device("cpu"), shard_size))

    def after_step(self, done, records, real=Saver.after_step):
        if done.global_step == last_step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(self, done, records)

    with pytest.MonkeyPatch.context() as patch, heeding_signals():
        patch.setattr(Saver, "after_step", after_step)
        try:
            outcome = run.run(resume=True)
            assert last_step is None
            weights = {name: whole(weight.detach()) for name, weight in run.model.named_parameters()}
            masks = {name: whole(mask) for name, mask in outcome.masks.items()}
            if is_main():
                torch.save((weights, masks), directory / WEIGHTS)
        except Stopped as stopped:
            assert last_step is not None
            assert str(stopped) == "stopped by SIGUSR1 after saving; run again with --resume"
    assert all(isinstance(p, DTensor) == bool(shard_size) for p in run.model.parameters())
    return run


def refusals(directory: Path) -> list[str]:
    """What a process says whose disk no other process sees, when states are written, and when there are some; and where
    an earlier version of losa wrote a state."""
    found = []
    for case, resume in ((f"{dist.get_rank()}-new", False), (f"{dist.get_rank()}-begun", True), ("earlier", True)):
        if resume and is_main():
            shutil.copytree(directory.with_name(WHOLE), directory / case)
            if case == "earlier":
                (state_paths(directory / case / "losa" / CHECKPOINTS)[-1] / "layers.safetensors").touch()
        try:
            rounds(directory / case).run(resume=resume)
        except OutputError as error:
            found.append(str(error))
    return found


def newest_sound(checkpoints: Path, place: Path) -> str:
    """The newest state without damage, where one process alone meets a damaged file."""
    newest = state_paths(checkpoints)[-1]
    if is_main():
        shutil.copytree(checkpoints, place)
        with (place / newest.name / "__1_0.distcp").open("ab") as file:
            file.write(b"x")
    dist.barrier()
    state = newest_state(place, read_document(newest / STATE))
    return "none" if state is None else state.path.name


def main(place: str) -> None:
    start_worker()
    directory = Path(place)
    found: dict = {}
    for name, stretches in CHAINS.items():
        for processes, shard_size, last_step in stretches:
            if processes == dist.get_world_size():
                found[name] = losses(stretch(directory / name, shard_size, last_step).work_dir)
    if dist.get_world_size() == 2:
        found["refusals"] = refusals(directory / "apart")
        found["newest sound"] = newest_sound(directory / WHOLE / "losa" / CHECKPOINTS, directory / "damaged")
    finish(found)
