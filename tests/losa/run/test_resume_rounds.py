"""Rounds that are stopped, fail or are killed anywhere, and go on to the same bits."""

from __future__ import annotations

import copy
import gc
import os
import signal
import weakref
from contextlib import contextmanager

import pytest
import torch

from losa.algorithm.stream import BlockStream
from losa.distributed.stop import Stopped, heeding_signals
from losa.model.wrapping import wrapped_linears
from losa.run.methods import Engine
from losa.run.saving import Saver
from losa.run.states import state_paths
from losa.training.distillation import DistillationLoss
from losa.training.position import StepDone
from tests.helpers.rounds import method_run, result
from tests.helpers.tiny import logits


class Killed(BaseException):
    """Stands for whatever ends a process between two saves."""


@contextmanager
def ends(step=0, saved=True, pruning=0, evaluating=0, by=None):
    """Within the context the run ends at this step of all rounds, or at this pass of pruning or evaluation.

    ``saved``: after the step was saved. ``by``: a signal.
    """
    passes = {"pruning": 0, "evaluating": 0}

    def after_step(self, done: StepDone, records, real=Saver.after_step):
        if done.global_step == step and by is not None:
            os.kill(os.getpid(), by)
        if done.global_step == step and by is None and not saved:
            raise Killed
        real(self, done, records)
        if done.global_step == step:
            raise Killed

    def run_round(self, plan, real=Engine.run_round):
        passes["pruning"] += 1
        if passes["pruning"] == pruning:
            if by is None:
                raise Killed
            os.kill(os.getpid(), by)
        return real(self, plan)

    with pytest.MonkeyPatch.context() as patch, heeding_signals():
        patch.setattr(Saver, "after_step", after_step)
        patch.setattr(Engine, "run_round", run_round)
        with pytest.raises(Killed if by is None else Stopped) as caught:

            def watched(run):
                evaluate = run.inputs.evaluate

                def evaluated(model):
                    passes["evaluating"] += 1
                    if passes["evaluating"] == evaluating:
                        raise Killed
                    return evaluate(model)

                run.inputs.evaluate = evaluated
                return run

            yield watched
    if by is not None:
        assert caught.value.exit_code == 75 and signal.Signals(by).name in str(caught.value)
        assert ("after saving" in str(caught.value)) == bool(step)


SETTINGS = {
    "wanda": {},
    "sparsegpt, reconstructed, distilled with norms, waiting for saves": {
        "prune": {"pruner": "sparsegpt"},
        "reconstruct": {"steps": 2},
        "checkpoint": {"asynchronous": False},
        "train": {"lr_schedule": "global", "distill": {"hidden": 0.1}, "norms": 0.5, "lora_plus": 4.0},
    },
    "dense adapters": {"method": "lora", "train": {"round_share": 1.0}},
    "all weights": {"method": "sparse_full", "layers": 1},
    "a budget of ranks": {"method": "adalora", "layers": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_ends_anywhere_goes_on_to_the_same_bits(tmp_path, name):
    settings = SETTINGS[name]
    if settings.get("method") == "adalora":
        pytest.importorskip("peft")
    whole = method_run(tmp_path / "whole", **settings)
    expected = result(whole, whole.run())
    lines: list[str] = []

    def run():
        made = method_run(tmp_path / "parts", **settings)
        made.log = lines.append
        return made

    with ends(pruning=1):
        run().run()
    with ends(step=1, saved=False):
        run().run(resume=True)
    with ends(step=2, by=signal.SIGUSR1):
        run().run(resume=True)
    with ends(step=4, by=signal.SIGTERM):
        run().run(resume=True)
    with ends(step=8, saved=False):
        run().run(resume=True)
    with ends(evaluating=1) as watched:
        watched(run()).run(resume=True)
    last = run()
    outcome = last.run(resume=True)
    assert result(last, outcome) == expected
    if settings.get("method") == "adalora":
        record, sides = outcome.rounds[-1], 64 + 48 + 48 + 64 + 3 * 96
        assert record.mean_rank == pytest.approx(3, abs=0.2) and max(record.ranks) <= 5
        assert outcome.result.parameters_trained == 5 * sides + 5 * 7, "also what was closed"
    # Times of earlier processes count.
    assert outcome.result.seconds > sum(record.seconds["train"] for record in outcome.rounds) > 0
    resumed = [line for line in lines if "resuming" in line]
    rounds = 1 if "method" in settings else 2
    assert resumed[:2] == [
        f"{last.name}: resuming in round 1 of {rounds}, after its pruning",
        f"{last.name}: resuming in round 1 of {rounds}, after training step 2",
    ]
    # A round is saved before it is evaluated.
    assert resumed[-1] == f"{last.name}: resuming after round {rounds} of {rounds}"


def test_a_stop_while_pruning_leaves_the_newest_state(tmp_path):
    with ends(pruning=2, by=signal.SIGTERM):
        method_run(tmp_path).run()
    assert [path.name for path in state_paths(tmp_path / "losa" / "checkpoints")][-1] == "round-01"


def test_a_stop_while_blocks_are_compared(tmp_path, monkeypatch):
    compared = []

    def gram(self, real=BlockStream.gram):
        compared.append(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(self)

    monkeypatch.setattr(BlockStream, "gram", gram)
    with heeding_signals(), pytest.raises(Stopped):
        method_run(tmp_path).run()
    assert len(compared) == 1, "the second block is not compared any more"


def test_dense_fine_tuning_goes_on_to_the_same_bits(tmp_path):
    whole = method_run(tmp_path / "whole", "finetune_then_prune")
    expected = result(whole, whole.run())
    parts = tmp_path / "parts"
    with ends(step=2, by=signal.SIGTERM):
        method_run(parts, "finetune_then_prune").run()
    with ends(step=5, saved=False):
        method_run(parts, "finetune_then_prune").run(resume=True)
    with ends(pruning=1):
        method_run(parts, "finetune_then_prune").run(resume=True)
    last, lines = method_run(parts, "finetune_then_prune"), []
    last.log = lines.append
    assert result(last, last.run(resume=True)) == expected
    assert lines[0] == "finetune_then_prune: resuming after round 1 of 1"


def test_moments_of_a_resumed_round_do_not_outlive_it(tmp_path, monkeypatch):
    with ends(step=2, saved=True):
        method_run(tmp_path).run()
    restored: list[weakref.ref] = []
    alive = []

    def resume(self, real=Saver.resume):
        found = real(self)
        restored.extend(map(weakref.ref, found.start.moments.values()))
        return found

    def run_round(self, plan, real=Engine.run_round):
        gc.collect()
        alive.append(sum(moment() is not None for moment in restored))
        return real(self, plan)

    monkeypatch.setattr(Saver, "resume", resume)
    monkeypatch.setattr(Engine, "run_round", run_round)
    method_run(tmp_path).run(resume=True)
    assert restored and alive == [0]


def test_originals_of_a_resumed_round_move_before_it_trains(tmp_path, monkeypatch):
    settings = {"prune": {"pruner": "sparsegpt"}}
    with ends(step=2):
        method_run(tmp_path, **settings).run()
    moved = []
    monkeypatch.setattr("losa.model.originals.on_host", lambda weight: moved.append(weight) or weight)
    resumed = method_run(tmp_path, **settings)
    with ends(step=3):
        resumed.run(resume=True)
    assert len(moved) == len(wrapped_linears(resumed.model)), "each once, and no step of pruning ran"


@pytest.mark.parametrize("method", ["lora", "sora", "sparse_lora"])
def test_the_teacher_of_a_run_is_the_dense_model(tmp_path, monkeypatch, method):
    """Bit for bit, while weights are replaced, masked in place and trained; and its weights stay where they are."""
    pruner = "wanda" if method == "sora" else "sparsegpt"
    run = method_run(tmp_path, method, prune={"pruner": pruner}, train={"distill": {"weight": 0.5}, "norms": 0.1})
    dense, found = copy.deepcopy(run.model), []

    @contextmanager
    def teaching(self, real=DistillationLoss._teaching):
        with real(self):
            found.append(torch.equal(logits(self.model), logits(dense)))
            yield
        found.append(not torch.equal(logits(self.model), logits(dense)))

    monkeypatch.setattr(DistillationLoss, "_teaching", teaching)
    monkeypatch.setattr("losa.model.originals.on_host", lambda weight: pytest.fail("every step reads the originals"))
    with ends(step=2):
        run.run()
    assert len(found) == 4 and all(found)


@pytest.mark.parametrize(
    "config, steps",
    [
        ({"every_steps": 2, "every_minutes": None}, [2, 4, 6, 8]),
        ({"every_steps": None, "every_minutes": 1e-9}, list(range(1, 10))),
        ({"every_steps": None, "every_minutes": 1e9}, []),
        ({"every_steps": None, "every_minutes": None}, []),
    ],
)
def test_when_states_are_saved(tmp_path, config, steps):
    method_run(tmp_path, rounds={"count": 1}, checkpoint=config | {"keep": 100}).run()
    found = [path.name for path in state_paths(tmp_path / "losa" / "checkpoints")]
    assert found == ["round-01-pruned", *(f"round-01-step-{step:08d}" for step in steps), "round-01"]
