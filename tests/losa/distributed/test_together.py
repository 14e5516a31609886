"""Processes start, wait, agree and exchange. In a bad launch every process says what is wrong; none waits for ever."""

from __future__ import annotations

import re

import pytest

from tests.helpers.cases import outcomes

# Seconds, also on a machine that is busy; a process waits 12 s in some cases.
LIMIT = 60

WORKER = """
import os, socket, sys, time
import accelerate, torch
import torch.distributed as dist
from losa.cli.app import main
from losa.distributed import agreement
from losa.distributed.agreement import check_shared
from losa.distributed.collectives import from_process, from_rank_zero, share_of, sum_over_processes
from losa.distributed.joining import as_patient
from losa.distributed.launch import end_together, start_processes, working_together
from losa.distributed.processes import (
    check_agreement, control_group, from_everyone, is_main, joined, on_main, process_count, process_index
)
from losa.distributed.stop import Stopped
from losa.distributed.turns import on_each_machine
from losa.errors import ModelError, OutputError
from losa.recipe import reading
from losa.recipe.machines import DistributedConfig
from pathlib import Path
from tests.helpers.cases import Case, run_cases

os.environ["LOSA_JOIN_TIMEOUT"] = "60"
taken = socket.create_server(("127.0.0.1", 0))
taken_port = str(taken.getsockname()[1])

def together(settings=lambda index: {}, config=DistributedConfig(timeout=50), inside=lambda index: None, patch=None):
    def work(index):
        if patch is not None and index == 1:
            setattr(*patch)
        with working_together("auto", config, settings(index)) as device:
            return device, process_count(), inside(index)
    return work

def group_timeouts(index):
    groups = control_group(), as_patient(dist.new_group())
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends], groups[0] is dist.group.WORLD

def nccl():
    return os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")

def alone(index):
    mine = torch.ones(2)
    same = from_process(mine, 0) is mine, sum_over_processes(mine).tolist(), list(share_of(3)), from_everyone(7)
    return joined(), is_main(), on_main(lambda: "written"), same

def shared(index):
    folder = Path(str(index))
    folder.mkdir()
    return check_shared(folder, wait=0.5)

def really_shared(index):
    Path("both").mkdir(exist_ok=True)
    return check_shared(Path("both")), sorted(Path("both").iterdir())

def raising(error):
    def work():
        raise error
    return work

def fails(index):
    works = raising(OutputError("no space")), raising(Stopped("SIGTERM")), lambda: time.sleep, lambda: sys
    for work in (*works, lambda: 1 / 0):
        try:
            print(on_main(work).__name__)
        except Exception as error:
            print(type(error).__name__, str(error).partition(";")[0])

def no_network(index):
    def work():
        if index == 1:
            raise ModelError("no network")
    on_each_machine(work)

def same_gpu(index):
    agreement._gpu = lambda: ("node1", "GPU-7")
    return together()(index)

def no_recipe(number):
    def work(index):
        time.sleep(index)
        return end_together("no recipe") if index == number else together()(index)
    return work

def losa(*words):
    def work(index):
        time.sleep(index)
        sys.argv = ["losa", *words]
        main()
    return work

def slowly():
    time.sleep(0.3)
    return {"rank": process_index()}

def tensor(index):
    own = torch.full((2,), index)
    return from_rank_zero(own).tolist(), own.tolist()

def on_one(index, **variables):
    return lambda number: variables if number == index else {}

soon = {"LOSA_JOIN_TIMEOUT": "12"}
nobody = {"RANK": None, "LOCAL_RANK": None, "WORLD_SIZE": None, "MASTER_ADDR": None, "MASTER_PORT": None}
hsdp = DistributedConfig(mode="hsdp", shard_size=2)
recipes = lambda index: {"recipe": {"train": {"learning_rate": 0.2 - 0.1 * index}, "seed": 0}}
Path("recipe.yaml").write_text("output: out")
Path("text.txt").write_text("one line")
run_cases({
    "well": Case(together(inside=group_timeouts)),
    "launched alone": Case(together(inside=alone), 1),
    "offload": Case(together(config=DistributedConfig(cpu_offload=True), inside=alone), 1, lambda index: nobody),
    "started alone": Case(together(inside=alone), 1, lambda index: nobody),
    "same rank": Case(together(), 3, on_one(2, RANK="1")),
    "world size": Case(together(), 2, on_one(1, WORLD_SIZE="3")),
    "missing": Case(together(), 2, lambda index: soon | {"WORLD_SIZE": "4"}),
    "port": Case(together(), 2, lambda index: soon | {"MASTER_PORT": taken_port}),
    "unreachable": Case(together(), 1, lambda index: soon | {"RANK": "1", "WORLD_SIZE": "2"}),
    "unknown host": Case(together(), 2, lambda index: soon | {"RANK": "1", "MASTER_ADDR": "no-host.invalid"}),
    "engine": Case(together(), 2, on_one(1, ACCELERATE_USE_DEEPSPEED="true")),
    "shard size": Case(together(config=hsdp), 3),
    "hsdp alone": Case(together(config=hsdp), 1),
    "recipe": Case(together(recipes), 3),
    "code": Case(together(patch=(agreement, "_source_digest", lambda: "0123456789ab"))),
    "torch": Case(together(patch=(torch, "__version__", "2.0.0"))),
    "version": Case(together(patch=(agreement, "__version__", "0.0.1"))),
    "disks": Case(together(inside=shared)),
    "one disk": Case(together(inside=really_shared)),
    "waits": Case(together(inside=lambda index: on_main(slowly))),
    "tensor": Case(together(inside=tensor)),
    "everyone": Case(together(inside=lambda index: from_everyone(str(index)))),
    "fails": Case(together(inside=fails)),
    "machines": Case(together(inside=no_network), 2, lambda index: {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}),
    "gpu": Case(same_gpu),
    "kernels": Case(together(), 2, on_one(1, LOSA_BACKEND="reference")),
    "no recipe": Case(no_recipe(1)),
    "no recipe in the first": Case(no_recipe(0)),
    "typo": Case(losa("run", "no-recipe.yaml")),
    "bad option": Case(losa("prune", "model", "--output", "out", "--data", "text.txt", "--sparsity", "2")),
    "text to split": Case(losa("run", "recipe.yaml", "--data", "text.txt")),
    "watched": Case(together(inside=lambda index: nccl())),
    "not watched": Case(lambda index: (start_processes("auto"), from_everyone(nccl()))),
    "agrees": Case(together(inside=lambda index: check_agreement("the seed", "7"))),
    "differs": Case(together(inside=lambda index: check_agreement("the seed", str(index)))),
})
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(WORKER, tmp_path_factory.mktemp("starts"))


def returned(processes: list[dict]) -> list[str]:
    assert [process["code"] for process in processes] == [0] * len(processes), processes
    return [process["said"].splitlines()[-1] for process in processes]


@pytest.mark.subprocess
def test_processes_start_together(found):
    """A collective waits for twice distributed.timeout, and small messages need no group of their own."""
    assert returned(found["well"]) == ["returned ('auto', 2, ([100.0, 100.0], True))"] * 2
    assert returned(found["one disk"]) == ["returned ('auto', 2, (None, []))"] * 2


@pytest.mark.subprocess
@pytest.mark.parametrize("case, grouped", [("launched alone", True), ("offload", True), ("started alone", False)])
def test_a_process_that_is_alone_is_treated_so(found, case, grouped):
    same = "(True, [1.0, 1.0], [0, 1, 2], [7])"
    assert returned(found[case]) == [f"returned ('auto', 1, ({grouped}, True, 'written', {same}))"]


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "case, message",
    [
        ("same rank", r"LosaError: two processes have RANK=1: one on host \S+, pid \d+, one on host \S+, pid \d+;"),
        ("world size", r"LosaError: WORLD_SIZE: process \d has \d, process \d has \d$"),
        ("missing", r"LosaError: of 4 processes these have not come within 12 s: 2, 3$"),
        ("unreachable", r"LosaError: process 1 \(host \S+\): the main process could not be reached at 127.0.0.1:\d+ "),
        ("unknown host", r"LosaError: process 1 \(host \S+\): .* no-host.invalid:\d+ \(MASTER_ADDR, .* within 12 s: "),
        ("engine", r"LosaError: process 1 \(host \S+, pid \d+\): distributed: DeepSpeed is not supported: "),
        ("shard size", r"RecipeError: distributed.shard_size: expected a divisor of 3 processes, got 2$"),
        ("hsdp alone", r"RecipeError: distributed.mode: hsdp needs several processes, and there is one; take fsdp$"),
        (
            "recipe",
            r"LosaError: recipe.train.learning_rate: process 1 has 0.1, process 0 has 0.2; start all processes ",
        ),
        ("code", r"LosaError: losa's source files: process 1 has '0123456789ab', process 0 has '\w{12}'; install "),
        ("torch", r"LosaError: torch: process 1 has '2.0.0', process 0 has '\S+'; install the same on every machine$"),
        ("machines", r"ModelError: no network$"),
        ("gpu", r"LosaError: processes 0 and 1 \(host node1\) have the same GPU; "),
        ("kernels", r"LosaError: LOSA_BACKEND: process 1 has 'reference', process 0 has ''; set the same in every"),
        ("no recipe", r"LosaError: process 1 \(host \S+, pid \d+\): no recipe$"),
        ("no recipe in the first", r"LosaError: process 0 \(host \S+, pid \d+\): no recipe$"),
        ("version", r"LosaError: losa: process 1 has '0.0.1', process 0 has '\S+'; install the same on every"),
        (
            "disks",
            r"OutputError: output: process 1 \(host \S+\) cannot see what process 0 \(host \S+\) writes into [01]; ",
        ),
    ],
)
def test_every_process_says_what_is_wrong(found, case, message):
    for process in found[case]:
        assert process["code"] == 1 and process["seconds"] < LIMIT, process["said"]
        assert re.search(f"^{message}", process["said"], re.MULTILINE), process["said"]


@pytest.mark.subprocess
def test_processes_wait_agree_and_exchange(found):
    assert returned(found["waits"]) == ["returned ('auto', 2, {'rank': 0})"] * 2
    assert returned(found["tensor"]) == [f"returned ('auto', 2, ([0, 0], [{i}, {i}]))" for i in range(2)]
    assert returned(found["everyone"]) == ["returned ('auto', 2, ['0', '1'])"] * 2
    assert returned(found["agrees"]) == ["returned ('auto', 2, None)"] * 2
    first, second = (process["said"].splitlines() for process in found["fails"])
    assert first[:3] == ["OutputError no space", "Stopped stopped by SIGTERM", "sleep"]
    assert "pickle" in first[3] and first[4] == "ZeroDivisionError division by zero"
    failed = ["LosaError the main process failed"]
    assert second[:5] == ["OutputError no space", *failed, "sleep", *failed, *failed]
    for process in found["differs"]:
        assert process["said"].startswith("OutputError: the seed: process 0 has 0, process 1 has 1; ")


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "case, message",
    [
        ("typo", r"recipe 'no-recipe.yaml': cannot be read \(No such file or directory\)"),
        ("bad option", r"prune: 1 problem.*\n.*sparsity: .*"),
        ("text to split", r"--data text.txt: expected a directory with .*: 2 processes do not split text; "),
    ],
)
def test_a_command_that_cannot_start_says_so_in_all_processes(found, case, message):
    """The first process, which keeps the store, waits for the second one, which comes a second later. Where both have
    the problem, on a busy machine either may be the one that is quoted."""
    said = [process["said"] for process in found[case]]
    assert said[0] == said[1] and re.match(rf"losa: process [01] \(host \S+, pid \d+\): {message}", said[0]), said
    assert all(process["code"] == 1 and process["seconds"] < 30 for process in found[case])


@pytest.mark.subprocess
def test_the_watchdog_of_nccl_is_off_only_where_processes_watch_each_other(found):
    assert returned(found["watched"]) == ["returned ('auto', 2, '0')"] * 2
    assert returned(found["not watched"]) == ["returned ('auto', [None, None])"] * 2


@pytest.mark.subprocess
def test_a_port_that_another_program_has(found):
    first, second = found["port"]
    assert re.search(r"LosaError: port \d+ on this machine is in use \(MASTER_PORT\); set another\n", first["said"])
    assert re.search(r"LosaError: process 1: the processes' store at \S+ .* cannot be used: ", second["said"])
    assert first["code"] == second["code"] == 1
