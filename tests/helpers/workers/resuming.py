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

from losa.distributed.sharding import make_sharding, shard_module, whole
from losa.distributed.stop import Stopped, heeding_signals
from losa.model.wrapping import wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.run.methods import MethodRun
from losa.run.saving import Saver
from tests.helpers.processes import finish, start_worker
from tests.helpers.rounds import losses, method_run

ADAPTERS = "adapters.pt"
# How many processes; how many of them hold one model together (0: each of them the whole); at which step they are
# stopped.
Stretch = tuple[int, int, int | None]
UNINTERRUPTED, WHOLE, SHARDED = "uninterrupted", "whole, whole, sharded", "sharded, one shard, 2 x 2 shards, whole"
CHAINS: dict[str, list[Stretch]] = {
    UNINTERRUPTED: [(2, 0, None)],
    WHOLE: [(2, 0, 5), (1, 0, 7), (4, 4, None)],
    # It begins where the first stretch of the chain above ends.
    SHARDED: [(2, 2, 6), (1, 1, 7), (4, 2, 8), (4, 0, None)],
}


def rounds(directory: Path, shard_size: int, last_step: int | None) -> MethodRun:
    """Go on with rounds of 2 and 8 steps, until the last process is asked to stop after ``last_step``."""
    run = method_run(
        directory,
        dropout=0.0,
        sequences_in_all=40,
        train={"round_share": 0.2},
        evaluate={"each_round": False},
        checkpoint={"every_steps": 3},
    )
    run._wrap(MaskedLoRALinear)
    if shard_size:
        shard_module(run.model, make_sharding(torch.device("cpu"), shard_size))

    def after_step(self, done, records, real=Saver.after_step):
        if done.global_step == last_step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(self, done, records)

    with pytest.MonkeyPatch.context() as patch, heeding_signals():
        patch.setattr(Saver, "after_step", after_step)
        try:
            run._run_rounds(run._engine(), resume=True)
        except Stopped as stopped:
            assert last_step is not None
            assert str(stopped) == "stopped by SIGUSR1 after saving; run again with --resume"
    assert all(isinstance(p, DTensor) == bool(shard_size) for p in run.model.parameters())
    return run


def main(directory: str) -> None:
    start_worker()
    found = {}
    for name, stretches in CHAINS.items():
        place = Path(directory) / name
        for stretch in stretches:
            processes, shard_size, last_step = stretch
            if processes != dist.get_world_size():
                continue
            if name == SHARDED and stretch == stretches[0] and dist.get_rank() == 0:
                shutil.copytree(place.with_name(WHOLE), place)
            dist.barrier()
            run = rounds(place, shard_size, last_step)
            adapters = {n: whole(m.lora_B.detach()) for n, m in wrapped_linears(run.model).items()}
            masks = {n: whole(m.mask.detach()) for n, m in wrapped_linears(run.model).items()}
            if dist.get_rank() == 0:
                torch.save((adapters, masks), place / ADAPTERS)
                found[name] = losses(run.work_dir)
    finish(found)
