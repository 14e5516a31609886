"""The batch script for SLURM, run as on several nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import yaml

from losa.distributed.watch import Limits
from losa_kernels.settings import JOIN_TIMEOUT
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


@pytest.mark.parametrize("seconds", [None, "45"])
def test_tasks_that_wait_for_a_missing_one_are_left_the_time_to_say_so(tmp_path, monkeypatch, seconds):
    monkeypatch.delenv("LOSA_JOIN_TIMEOUT", raising=False)
    if seconds is not None:
        monkeypatch.setenv("LOSA_JOIN_TIMEOUT", seconds)
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, nodes="1", ntasks_per_node="1", gres="none")
    assert slurm.run("recipe.yaml") == (0, "")
    assert f"LOSA_JOIN_TIMEOUT={JOIN_TIMEOUT():g}\n" in (tmp_path / "environment.0").read_text()
    # The watch's own limit comes on top, for a task that has just joined.
    assert slurm.waited() >= JOIN_TIMEOUT() + Limits(progress=1800).silent


@pytest.mark.parametrize(
    "codes, ends, again",
    [
        ((75, 75), 75, True),
        ((0, 75), 75, True),
        ((1, 1), 1, False),
        # Another process is gone: killed, or with its node. Those that are left say so with 76.
        ((76, 76), 76, True),
        ((75, 76), 76, True),
        ((76, 137), 137, True),
        ((143, 75), 143, True),
    ],
)
def test_a_job_that_can_go_on_is_queued_again(tmp_path, codes, ends, again):
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, nodes="2", ntasks_per_node="1", gres="none")
    for rank, code in enumerate(codes):
        (tmp_path / f"code.{rank}").write_text(str(code))
    # The processes of a run end a moment apart.
    (tmp_path / "seconds.1").write_text("0.3")
    log = f"losa.sbatch: exit code {ends} after 0 restarts: queued again\n" if again else ""
    assert slurm.run("recipe.yaml") == (ends, log)
    assert slurm.requeued() == [JOB] * again


def test_restarts_have_a_limit(tmp_path, monkeypatch):
    def job(folder: str, restarts: int) -> tuple[int, str, list[str]]:
        slurm = Slurm(SCRIPT, tmp_path / folder, FAKE_LOSA, nodes="1", ntasks_per_node="1", gres="none")
        (tmp_path / folder / "code.0").write_text("75")
        slurm.runs = restarts
        return (*slurm.run("recipe.yaml"), slurm.requeued())

    assert job("last", 19) == (75, "losa.sbatch: exit code 75 after 19 restarts: queued again\n", [JOB])
    refused = "losa.sbatch: exit code 75 after 20 restarts (MAX_RESTARTS): not queued again\n"
    assert job("one too many", 20) == (75, refused, [])
    monkeypatch.setenv("MAX_RESTARTS", "21")
    assert job("allowed", 20) == (75, refused.replace(" (MAX_RESTARTS): not", ":"), [JOB])


def test_a_job_that_lost_a_node_is_queued_again(tmp_path):
    """The node's task never ends by itself. The other task says that it is lost, and ends."""
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, wait=0.3, nodes="2", ntasks_per_node="1", gres="none")
    (tmp_path / "code.0").write_text("76")
    (tmp_path / "hangs.1").touch()
    assert slurm.run("recipe.yaml", timeout=60)[0] == 137
    assert slurm.requeued() == [JOB]


def test_a_cancelled_job_stays_cancelled(tmp_path):
    slurm = Slurm(SCRIPT, tmp_path, FAKE_LOSA, nodes="2", ntasks_per_node="1", gres="none")
    (tmp_path / "wait").touch()
    with slurm.running("recipe.yaml") as script:
        wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == 2 and bool(slurm.processes()))
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
    assert not slurm.processes()


@pytest.mark.subprocess
def test_a_job_of_two_nodes_is_warned_queued_again_and_completes(tmp_path):
    """What was trained before the warning stays, and the second run of the script goes on behind it."""
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i}: the quick brown fox jumps over the dog.\n" for i in range(400)))
    recipe = settings(tmp_path, tmp_path / "output")
    # 64 sequences, two a step.
    recipe["train"] |= {"batch_size": 1, "max_tokens": 32 * 64}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = {"nodes": "2", "ntasks_per_node": "1", "cpus_per_task": "1", "gres": "none"}
    slurm, words = Slurm(SCRIPT, tmp_path / "slurm", REAL_LOSA, **options), str(tmp_path / "recipe.yaml")
    metrics = tmp_path / "output.work/losa/metrics.jsonl"
    with slurm.running(words) as script:
        wait_for(lambda: script.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 3))
        slurm.warn()
        log, _ = script.communicate(timeout=200)
    assert script.returncode == 75, log
    assert "stopped by SIGUSR1 after saving" in log and slurm.requeued() == [JOB]
    before = metrics.read_text()
    assert not (tmp_path / "output").exists() and before.count("\n") > 3

    code, log = slurm.run(words)
    assert code == 0, log
    assert slurm.requeued() == [JOB]
    after = (tmp_path / "output/metrics-losa.jsonl").read_text()
    assert after.startswith(before)
    steps = [json.loads(line)["step"] for line in after.splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > before.count("\n")
