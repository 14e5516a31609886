"""The batch script for SLURM, run as on several nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.processes import ROOT
from tests.helpers.runs import settings
from tests.helpers.slurm import FAKE_LOSA, REAL_LOSA, Slurm, batch_options
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

SCRIPT = ROOT / "examples/slurm/losa.sbatch"
JOB = "7012345"


def wait_for(condition: Callable[[], bool], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("nodes, tasks, gpus", [(1, 1, False), (2, 4, True)])
def test_each_task_knows_its_place(tmp_path, nodes, tasks, gpus):
    gres = f"gpu:{tasks}" if gpus else "none"
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, "node-a", nodes=str(nodes), ntasks_per_node=str(tasks), gres=gres)
    assert slurm.run("my recipe.yaml", "--set", "compare=[lora, sparse_lora]") == (0, "")
    for rank in range(nodes * tasks):
        words = (tmp_path / f"words.{rank}").read_text().splitlines()
        assert words == ["run", "my recipe.yaml", "--set", "compare=[lora, sparse_lora]", "--resume"]
        lines = (tmp_path / f"environment.{rank}").read_text().splitlines()
        seen = dict(line.split("=", 1) for line in lines if "=" in line)
        assert int(seen["LOCAL_RANK"]) == rank % tasks
        assert int(seen["WORLD_SIZE"]) == nodes * tasks and int(seen["LOCAL_WORLD_SIZE"]) == tasks
        assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("node-a", "22345")
        assert seen["OMP_NUM_THREADS"] == "8"
    assert slurm.requeued() == []


@pytest.mark.parametrize(
    "codes, ends, again",
    [
        ((75, 75), 75, [JOB]),
        ((0, 75), 75, [JOB]),
        ((1, 1), 1, []),
        # One process is gone, so that what was saved is not whole.
        ((75, 137), 137, []),
    ],
)
def test_a_job_that_saved_is_queued_again(tmp_path, codes, ends, again):
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, nodes="2", ntasks_per_node="1", gres="none")
    for rank, code in enumerate(codes):
        (tmp_path / f"code.{rank}").write_text(str(code))
    # The processes of a run end a moment apart.
    (tmp_path / "seconds.1").write_text("0.3")
    assert slurm.run("recipe.yaml") == (ends, "")
    assert slurm.requeued() == again


def test_a_cancelled_job_stays_cancelled(tmp_path):
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, nodes="2", ntasks_per_node="1", gres="none")
    (tmp_path / "wait").touch()
    with slurm.running("recipe.yaml") as script:
        wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == 2 and bool(slurm.tasks()))
        slurm.cancel(script)
        assert script.wait(timeout=60) == 143
    assert slurm.requeued() == []


def test_what_the_script_asks_of_slurm(tmp_path):
    options = batch_options(SCRIPT)
    assert options["--gres"] == f"gpu:{options['--ntasks-per-node']}"
    assert {"--requeue": "", "--open-mode": "append", "--signal": "USR1@300"}.items() <= options.items()
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, gres="gpu:4")
    message = "losa.sbatch: 8 tasks on a node with 4 GPUs: submit with --ntasks-per-node=4\n"
    assert slurm.run("recipe.yaml") == (1, message)
    code, log = slurm.run()
    assert code != 0 and "usage: sbatch losa.sbatch RECIPE" in log
    assert not slurm.tasks()


def losses(output: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (output / "metrics-losa.jsonl").read_text().splitlines()]
    return [(line["round"], line["step"], line["loss"]) for line in lines]


@pytest.mark.subprocess
def test_a_job_of_two_nodes_is_warned_queued_again_and_completes(tmp_path):
    """The result is that of a job that nobody warned, bit for bit."""
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i}: the quick brown fox jumps over the dog.\n" for i in range(400)))
    changes = {"length": 32, "batch_size": 1, "max_tokens": 32 * 64, "learning_rate": 5e-3}
    for name in ("straight", "warned"):
        recipe = settings(tmp_path, tmp_path / name)
        recipe["train"] |= changes
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))

    def job(name: str) -> Slurm:
        options = {"nodes": "2", "ntasks_per_node": "1", "cpus_per_task": "1", "gres": "none"}
        return Slurm(SCRIPT, tmp_path / f"slurm-{name}", REAL_LOSA, **options)

    code, log = job("straight").run(str(tmp_path / "straight.yaml"))
    assert code == 0, log
    steps = losses(tmp_path / "straight")

    slurm, recipe = job("warned"), str(tmp_path / "warned.yaml")
    metrics = tmp_path / "warned.work/losa/metrics.jsonl"
    with slurm.running(recipe) as script:
        wait_for(lambda: script.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 3))
        slurm.warn()
        log, _ = script.communicate(timeout=200)
    assert script.returncode == 75, log
    assert "stopped by SIGUSR1 after saving" in log and slurm.requeued() == [JOB]
    assert not (tmp_path / "warned").exists() and 3 < metrics.read_text().count("\n") < len(steps)

    code, log = slurm.run(recipe)
    assert code == 0, log
    assert slurm.requeued() == [JOB]
    assert losses(tmp_path / "warned") == steps
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "warned")]
    assert weights[0] == weights[1]
