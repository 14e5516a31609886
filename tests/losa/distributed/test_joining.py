"""How processes find each other: the order in which they come, the launcher's variables, what is refused."""

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
from losa.recipe.machines import DistributedConfig


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
