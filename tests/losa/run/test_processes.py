"""How processes wait for the main one, agree, and are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from losa.distributed import processes
from losa.errors import LosaError
from losa.recipe.reading import parse_recipe
from losa.run import pipeline
from losa.run.pipeline import run_recipe
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]

WORKER = """
import json, os, sys, time
import torch
import torch.distributed as dist
from losa.distributed.collectives import from_rank_zero
from losa.distributed.launch import start_processes
from losa.distributed.processes import check_agreement, on_main, process_index
from losa.errors import LosaError
from losa.algorithm.engine import Engine
from losa.recipe import parse_recipe
from losa.run import run_recipe

root = sys.argv[1]
start_processes("cpu")
rank = process_index()
seen = {}

def attempt(name, function):
    try:
        seen[name] = function()
    except (Exception, KeyboardInterrupt) as error:
        seen[name] = f"{type(error).__name__}: {error}"

def slowly():
    time.sleep(0.3)
    return {"rank": rank}

def fails():
    raise ValueError("of rank zero")

def interrupted(self, plan, run_round=Engine.run_round):
    if plan.index == 2:
        raise KeyboardInterrupt
    return run_round(self, plan)

own = torch.full((2,), rank)
attempt("value", lambda: on_main(slowly))
attempt("tensor", lambda: [from_rank_zero(own).tolist(), own.tolist()])
attempt("failure", lambda: on_main(fails))
attempt("agree", lambda: check_agreement("the seed", "7"))
attempt("differ", lambda: check_agreement("the seed", str(rank)))
# Every process has a disk of its own: only the main one finds the round that it has kept.
recipe = json.load(open(f"{root}/recipe.json")) | {"output": f"{root}/{rank}/out"}
run_round, Engine.run_round = Engine.run_round, interrupted
attempt("first", lambda: run_recipe(parse_recipe(recipe)))
Engine.run_round = run_round
attempt("resumed", lambda: run_recipe(parse_recipe(recipe), resume=True))
attempt("tokens", lambda: run_recipe(parse_recipe(recipe | {"seed": rank}), resume=True))
with open(f"{root}/{rank}.json", "w") as file:
    json.dump(seen, file)
dist.barrier()
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
def test_two_processes_wait_and_agree(tmp_path):
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i}: the quick brown fox jumps.\n" for i in range(60)))
    (tmp_path / "recipe.json").write_text(json.dumps(settings(tmp_path)))
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "1",
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero["value"] == one["value"] == {"rank": 0}
    assert (zero["tensor"], one["tensor"]) == ([[0, 0], [0, 0]], [[0, 0], [1, 1]])
    assert zero["failure"] == "ValueError: of rank zero"
    assert one["failure"] == "LosaError: the main process failed; its own message says why"
    assert zero["agree"] is None and one["agree"] is None
    for seen in (zero, one):
        assert seen["differ"].startswith("OutputError: the seed: process 0 has 0, process 1 has 1; ")
        assert seen["first"].startswith("KeyboardInterrupt")
        assert "losa: the newest checkpoint: process 0 has round 1 (" in seen["resumed"]
        assert "process 1 has none; " in seen["resumed"] and "all of them share" in seen["resumed"]
        assert seen["tokens"].startswith("OutputError: calibration tokens: process 0 has ")


class Store:
    """A key-value store whose process ends after so many questions."""

    def __init__(self, questions):
        self.questions = questions

    def check(self, keys):
        self.questions -= 1
        if not self.questions:
            raise dist.DistNetworkError("Connection reset by peer")
        return False


def test_the_main_process_is_gone():
    with pytest.raises(LosaError, match="the main process ended before its work was done"):
        processes._wait(Store(3), "key")


@pytest.mark.parametrize(
    "plugin, processes, kind",
    [
        ("DEEPSPEED", 1, "DeepSpeed"),
        ("DEEPSPEED", 8, "DeepSpeed"),
        ("FSDP", 2, "FSDP"),
        ("MEGATRON_LM", 2, "MEGATRON_LM"),
    ],
)
def test_sharded_weights_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, plugin, processes, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(pipeline, "load_model", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(LosaError, match=rf"{kind} is not supported.*--multi_gpu"):
        run_recipe(parse_recipe(settings(tmp_path)))
    assert list(tmp_path.iterdir()) == []
