"""Runs on two processes under torchrun: interrupted and resumed, or with texts that differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from losa.errors import LosaError
from losa.recipe.reading import parse_recipe
from losa.run import pipeline
from losa.run.pipeline import run_recipe
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]

WORKER = """
import json, os, sys
from losa.algorithm.engine import Engine
from losa.distributed.processes import launched
from losa.recipe import parse_recipe
from losa.run import choice, inputs, run_recipe

root, rank, seen = sys.argv[1], launched().index, {}
recipe = json.load(open(f"{root}/recipe.json"))

def attempt(name, function):
    try:
        seen[name] = function()
    except (Exception, KeyboardInterrupt) as error:
        seen[name] = f"{type(error).__name__}: {error}"

def interrupted(self, plan, run_round=Engine.run_round):
    if plan.index == 2:
        raise KeyboardInterrupt
    return run_round(self, plan)

run_round, Engine.run_round = Engine.run_round, interrupted
attempt("first", lambda: run_recipe(parse_recipe(recipe)))
Engine.run_round = run_round
attempt("other recipe", lambda: run_recipe(parse_recipe(recipe | {"seed": rank}), resume=True))
# Each process finds another text under the same name.
os.makedirs(f"{root}/{rank}")
os.chdir(f"{root}/{rank}")
with open("text.txt", "w") as file:
    file.write("".join(f"{i} {rank}: the quick brown fox jumps.\\n" for i in range(60)))
calibration = recipe["calibration"] | {"data": "text.txt"}
attempt("other text", lambda: run_recipe(parse_recipe(recipe | {"calibration": calibration}), resume=True))
# The length of a text decides whether its windows are looked at by forward passes, which processes with shards share.
evaluation = {"data": "heldout.txt", "length": 16, "batch_size": 1}
with open("heldout.txt", "w") as file:
    file.write("the quick brown fox jumps. " * (40 if rank else 6))
sharded = recipe | {"evaluate": evaluation, "distributed": {"mode": "fsdp", "timeout": 60}}
look, inputs.warn_of_missing_start = inputs.warn_of_missing_start, lambda *arguments: seen.update(looked=True)
attempt("other evaluation", lambda: run_recipe(parse_recipe(sharded), resume=True))
inputs.warn_of_missing_start = look
capacity, choice.capacity = choice.capacity, lambda device: {"host": 1 if rank == 0 else 10**12}
attempt("too large", lambda: run_recipe(parse_recipe(recipe | {"output": f"{root}/large"})))
choice.capacity = capacity
attempt("resumed", lambda: len(run_recipe(parse_recipe(recipe), resume=True).rounds))
with open(f"{root}/{rank}.json", "w") as file:
    json.dump(seen, file)
# gloo's threads, torn down with the interpreter, abort one run in some thirty.
os._exit(0)
"""


def settings(root) -> dict:
    return {
        "model": str(root / "model"),
        "output": str(root / "out"),
        "device": "cpu",
        "prune": {"sparsity": 0.5},
        "rounds": {"count": 2},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "calibration": {"data": str(root / "text.txt"), "samples": 2, "length": 16, "cka_samples": 2},
        "train": {"data": str(root / "text.txt"), "length": 16, "batch_size": 1, "max_tokens": 64},
    }


@pytest.mark.subprocess
def test_two_processes_are_interrupted_and_go_on(tmp_path):
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i}: the quick brown fox jumps.\n" for i in range(60)))
    (tmp_path / "recipe.json").write_text(json.dumps(settings(tmp_path)))
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["first"].startswith("KeyboardInterrupt")
        assert seen["other recipe"].startswith("LosaError: recipe.seed: process 1 has 1, process 0 has 0; ")
        assert seen["other text"].startswith("OutputError: calibration tokens: process 0 has ")
        assert seen["other evaluation"].startswith("OutputError: evaluation tokens: process 0 has ")
        assert "looked" not in seen
        assert seen["too large"].startswith(
            "LosaError: memory: in the phase training the 2 processes of a machine hold"
        )
    assert not list(tmp_path.glob("large*"))
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["resumed"] == 2


def test_another_engine_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(pipeline, "load_model", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(LosaError, match="DeepSpeed is not supported.*distributed.mode: fsdp"):
        run_recipe(parse_recipe(settings(tmp_path)))
    assert list(tmp_path.iterdir()) == []
