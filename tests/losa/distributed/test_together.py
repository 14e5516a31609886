"""Processes start, wait, agree and exchange. In a bad launch every process says what is wrong; none waits for ever."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from threading import Event, Thread

import pytest
import torch
import torch.distributed as dist

from losa.distributed import joining, launch, processes
from losa.distributed.joining import ALONE, Place, read_place
from losa.distributed.launch import as_launched, check_config, check_launcher
from losa.errors import LosaError, RecipeError
from losa.recipe.sections import DistributedConfig
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
from losa.recipe.sections import DistributedConfig
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
    """The first process, which keeps the store, waits for the second one, which comes a second later."""
    said = [process["said"] for process in found[case]]
    assert said[0] == said[1] and re.match(rf"losa: process 0 \(host \S+, pid \d+\): {message}", said[0]), said
    assert all(process["code"] == 1 and process["seconds"] < 30 for process in found[case])


@pytest.mark.subprocess
def test_the_watchdog_of_nccl_is_off_only_where_processes_watch_each_other(found):
    assert returned(found["watched"]) == ["returned ('auto', 2, '0')"] * 2
    assert returned(found["not watched"]) == ["returned ('auto', [None, None])"] * 2


class Paused:
    """A key-value store whose process waits before its call number ``call`` until ``resume`` is set."""

    def __init__(self, store, call, resume):
        self.store, self.call, self.resume = store, call, resume

    def __getattr__(self, name):
        self.call -= 1
        if self.call == 0:
            assert self.resume.wait(20)
        return getattr(self.store, name)


class Counting(Paused):
    """A key-value store that sets ``resume`` at its process's call number ``call``."""

    def __getattr__(self, name):
        self.call -= 1
        if self.call == 0:
            self.resume.set()
        return getattr(self.store, name)


@pytest.mark.parametrize(
    "counts, problem, message",
    [
        ((2, 3), None, r"WORLD_SIZE: process \d has \d, process \d has \d"),
        ((2, 2), "no GPU", r"process 1 \(.*\): no GPU"),
    ],
)
@pytest.mark.parametrize("paused", [0, 1])
def test_whatever_the_order_no_process_goes_on_where_another_one_has_a_problem(
    monkeypatch, paused, counts, problem, message
):
    """One process stops before each of its calls of the store, the first and the last, until the other one has done all
    that it can do alone."""
    monkeypatch.setattr(joining, "_POLL", 0.001)

    def meet(index, store, resume):
        try:
            place = Place(index, counts[index], index, 2, "localhost", 1)
            joining._meet(store, place, "cpu", problem if index == 1 else None, 20, time.monotonic())
            said[index] = "went on"
        except LosaError as error:
            said[index] = str(error)
        resume.set()

    for call in range(1, 10):
        store, said, resume = dist.HashStore(), {}, Event()
        stores = {paused: Paused(store, call, resume), 1 - paused: Counting(store, 30, resume)}
        threads = [Thread(target=meet, args=(index, stores[index], resume)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert said[0] == said[1] and re.fullmatch(message, said[0]), (call, said)


def test_the_store_goes_with_a_process_that_is_killed(monkeypatch):
    monkeypatch.setattr(joining, "_connect", lambda *_: Store(1))
    with pytest.raises(LosaError, match="process 1: the processes' store at node7:1 .* is gone: Connection reset"):
        joining.join(Place(1, 2, 1, 2, "node7", 1), "cpu", None, timedelta(), 5)


class Store:
    """A key-value store whose process ends after so many questions."""

    def __init__(self, questions):
        self.questions = questions

    def check(self, keys):
        return self.compare_set()

    def compare_set(self, *key_and_values):
        self.questions -= 1
        if not self.questions:
            raise dist.DistNetworkError("Connection reset by peer")
        return False


def test_the_main_process_is_gone():
    with pytest.raises(LosaError, match="the main process ended before its work was done"):
        processes._wait(Store(3), "key")


@pytest.mark.subprocess
def test_a_port_that_another_program_has(found):
    first, second = found["port"]
    assert re.search(r"LosaError: port \d+ on this machine is in use \(MASTER_PORT\); set another\n", first["said"])
    assert re.search(r"LosaError: process 1: the processes' store at \S+ .* cannot be used: ", second["said"])
    assert first["code"] == second["code"] == 1


LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def launched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def launch(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_the_variables_of_a_launcher(launched):
    assert read_place() is None
    launched(WORLD_SIZE="1")
    assert read_place() is None
    launched(**LAUNCHED)
    assert read_place() == Place(3, 8, 1, 2, "node7", 29500)
    launched(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    assert read_place() == ALONE


def test_processes_of_mpi_are_no_processes_of_ours(launched):
    launched(OMPI_COMM_WORLD_SIZE="1")
    assert read_place() is None
    launched(OMPI_COMM_WORLD_SIZE="2")
    with pytest.raises(LosaError, match="RANK and WORLD_SIZE of a launcher, found OMPI_COMM_WORLD_SIZE of MPI"):
        read_place()


@pytest.mark.parametrize(
    "device, place, chosen", [("cuda:1", None, "cuda:1"), ("auto", Place(5, 8, 1, 4, "a", 1), "cuda:1")]
)
def test_a_process_works_on_its_gpu(monkeypatch, device, place, chosen):
    """Also a process that is alone: what it shards, or keeps in host memory, becomes whole on the current device."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert launch._own_device(device, "cuda", place) == chosen
    assert current == [1]
    with pytest.raises(LosaError, match="LOCAL_RANK: expected a number below 2, the GPUs here, got 3"):
        launch._own_device("auto", "cuda", Place(3, 4, 3, 4, "a", 1))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("RANK", None, "RANK: expected a number from 0 to 7, is not set"),
        ("RANK", "8", "RANK: expected a number from 0 to 7, got '8'"),
        ("RANK", "first", "RANK: expected a number from 0 to 7, got 'first'"),
        ("WORLD_SIZE", None, "WORLD_SIZE: expected a number from 1 to .* is not set"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: expected a number from 1 to .* got '0'"),
        ("LOCAL_RANK", None, "LOCAL_RANK: expected a number from 0 to 1, is not set"),
        ("LOCAL_RANK", "2", "LOCAL_RANK: expected a number from 0 to 1, got '2'"),
        ("MASTER_ADDR", None, "MASTER_ADDR: expected the host of process 0, is not set"),
        ("MASTER_PORT", None, "MASTER_PORT: expected a number from 1 to 65535, is not set"),
        ("MASTER_PORT", "70000", "MASTER_PORT: expected a number from 1 to 65535, got '70000'"),
    ],
)
def test_a_variable_that_is_missing_or_nonsense_is_named(launched, name, value, message):
    launched(**{key: text for key, text in (LAUNCHED | {name: value}).items() if text is not None})
    with pytest.raises(LosaError, match=message):
        read_place()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "Megatron-LM is not supported"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism is not supported"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "4"}, "context parallelism is not supported"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "4"}, "sequence parallelism is not supported"),
        (
            {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"},
            "with --max-restarts 3 on 2 machines torchrun .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1 is not supported"),
    ],
)
def test_what_is_not_supported_is_named(launched, variables, message):
    launched(**variables)
    with pytest.raises(LosaError, match=message):
        check_launcher()


def test_a_launch_with_fsdp_means_fsdp(launched):
    auto, ddp = DistributedConfig(), DistributedConfig(mode="ddp")
    assert as_launched(auto) == auto
    launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", PARALLELISM_CONFIG_TP_SIZE="1")
    check_launcher()
    assert as_launched(auto).mode == "fsdp" and as_launched(ddp) == ddp
    with pytest.raises(RecipeError, match="distributed.mode: ddp, but the processes were launched with FSDP"):
        check_config(ddp, 2, 2)


def test_hsdp_shards_over_a_machine_by_default(launched):
    check_config(DistributedConfig(mode="hsdp"), 8, 4)
    with pytest.raises(RecipeError, match="divisor of 8 processes, got 3, the processes of one machine"):
        check_config(DistributedConfig(mode="hsdp"), 8, 3)
