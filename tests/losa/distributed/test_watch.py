"""Processes that are killed, hang, fail or go silent end the job with a message that names them."""

from __future__ import annotations

import re

import pytest

from tests.helpers.cases import outcomes

# Seconds, also on a machine that is busy. What the watch did not end would go on for 60 s and more.
LIMIT = 55

WORKER = """
import os, signal, time
import torch
import torch.distributed as dist
from losa.distributed import watch
from losa.distributed.joining import join, read_place
from losa.distributed.processes import on_main
from losa.distributed.stop import agree, check, heeding_signals
from losa.distributed.watch import Limits, progress, watched
from losa.errors import LosaError
from tests.helpers.cases import Case, run_cases
from datetime import timedelta

moving = Limits(progress=60, period=0.25, silent=10, broken=5, grace=3)
standing = Limits(progress=6, period=0.25, silent=30, broken=5, grace=3)
patient = Limits(progress=60, period=0.25, silent=60, broken=5, grace=3)

def watch_over(middle, limits=moving, after=lambda index: None):
    def work(index):
        join(read_place(), "cpu", None, timedelta(seconds=60))
        with watched(limits):
            dist.all_reduce(torch.ones(1))
            progress("step 1")
            result = middle(index)
            progress("step 2")
            dist.all_reduce(torch.ones(1))
            after(index)
        return result
    return work

def only(number, do):
    return lambda index: do() if index == number else None

def send(number):
    return lambda: os.kill(os.getpid(), number)

def fail():
    raise ValueError("no numbers")

def fail_alike(index):
    raise LosaError("the same everywhere")

def one_fails_and_nobody_waits_for_it(number):
    def work(index):
        if index == number:
            fail()
        time.sleep(40)
    return work

def one_hangs_where_the_others_wait(index):
    if index == 1:
        time.sleep(50)
    agree()

def nccl_breaks(lost):
    # NCCL's kernels would wait for ever, as these processes do.
    def work(index):
        if index == 1:
            watch._nccl_is_broken = lambda: True
        if index == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(50)
    return work

def nccl_cannot_be_asked(index):
    if index == 1:
        watch._nccl_is_broken = lambda: int("no backend")
    time.sleep(50)

launchers_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
kept_by_launcher = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(launchers_store.port)}

def asked(index):
    with heeding_signals():
        if index == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2 * index)
        found = agree()
        check()

run_cases({
    "well": Case(watch_over(lambda index: on_main(lambda: "done"), after=lambda index: time.sleep(index))),
    "killed": Case(watch_over(only(1, send(signal.SIGKILL))), 3),
    "killed main": Case(watch_over(only(0, send(signal.SIGKILL))), 3),
    "killed while writing": Case(watch_over(lambda index: on_main(send(signal.SIGKILL))), 2),
    "frozen": Case(watch_over(only(1, send(signal.SIGSTOP))), 3, frozen=1),
    "frozen main": Case(watch_over(only(0, send(signal.SIGSTOP))), 3, frozen=0),
    "standing": Case(watch_over(lambda index: time.sleep(50 if index == 1 else 0.5), standing), 3),
    "writing": Case(watch_over(lambda index: on_main(lambda: time.sleep(10)), standing), 2),
    "failed": Case(watch_over(only(1, fail)), 3),
    "failed main": Case(watch_over(only(0, fail)), 3),
    "failed alone": Case(watch_over(one_fails_and_nobody_waits_for_it(1)), 3),
    "failed main alone": Case(
        watch_over(one_fails_and_nobody_waits_for_it(0)), 3, lambda index: kept_by_launcher
    ),
    "waiting": Case(watch_over(one_hangs_where_the_others_wait, standing), 3),
    "nccl": Case(watch_over(nccl_breaks(lost=None), patient), 3),
    "nccl lost": Case(watch_over(nccl_breaks(lost=2), patient), 3),
    "nccl unknown": Case(watch_over(nccl_cannot_be_asked, moving)),
    "failed alike": Case(watch_over(fail_alike), 3),
    "asked to stop": Case(watch_over(asked), 3),
})
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(WORKER, tmp_path_factory.mktemp("watch"))


def codes(processes: list[dict]) -> list[int]:
    return [process["code"] for process in processes]


@pytest.mark.subprocess
@pytest.mark.parametrize("case, result", [("well", "done"), ("writing", "None")])
def test_processes_end_well(found, case, result):
    """Also when one of them writes for longer than the job may stand still."""
    assert codes(found[case]) == [0, 0]
    assert all(f"returned {result}" in process["said"] for process in found[case])


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "case, lost, expected",
    [
        ("killed", 1, r"process 1 \(host \S+, pid \d+\) has not been heard for 5 s: killed"),
        ("killed main", 0, r"process 0 \(host \S+, pid \d+\), or the launcher that keeps the store, is gone"),
        ("killed while writing", 0, r"process 0 \(host \S+, pid \d+\), or the launcher"),
        ("nccl lost", 2, r"process 2 \(host \S+, pid \d+\) has not been heard for 5 s: killed"),
        ("frozen", 1, r"process 1 \(host \S+, pid \d+\) has not been heard for 10 s: killed, hung"),
        ("frozen main", 0, r"store .*: process 0 \(host \S+, pid \d+\), or the launcher .* is gone or hangs"),
    ],
)
def test_a_lost_process_is_named_by_all_others(found, case, lost, expected):
    others = [process for index, process in enumerate(found[case]) if index != lost]
    assert found[case][lost]["code"] == -9, found[case]
    for process in others:
        assert process["code"] == 76 and process["seconds"] < LIMIT, process
        assert re.search(expected, process["said"]), process["said"]


@pytest.mark.subprocess
def test_a_process_that_stands_still_is_named_with_its_place(found):
    for process in found["standing"]:
        assert process["code"] == 76 and process["seconds"] < LIMIT
        assert "no process makes progress: process 1 (host " in process["said"]
        assert " at step 1 for " in process["said"] and "; processes 0, 2 at step 2 for " in process["said"]


@pytest.mark.subprocess
def test_a_process_that_others_wait_for_is_told_from_them(found):
    for process in found["waiting"]:
        assert process["code"] == 76 and process["seconds"] < LIMIT
        assert "no process makes progress: process 1 (host " in process["said"]
        assert "; processes 0, 2 waiting for others at step 1 for " in process["said"]


@pytest.mark.subprocess
def test_an_error_of_nccl_ends_the_job_where_all_processes_live(found):
    for process in found["nccl"]:
        assert process["code"] == 76 and process["seconds"] < LIMIT
        assert "NCCL met an error, which it logs, in process 1 (host " in process["said"]


@pytest.mark.subprocess
def test_a_process_that_cannot_ask_nccl_says_so(found):
    first, second = found["nccl unknown"]
    assert first["code"] == 76 and "process 1 (host " in first["said"], first
    assert second["code"] == 1 and "losa: NCCL cannot be asked for errors (ValueError: " in second["said"], second


@pytest.mark.subprocess
@pytest.mark.parametrize(
    "case, failed", [("failed", 1), ("failed main", 0), ("failed alone", 1), ("failed main alone", 0)]
)
def test_a_process_that_fails_is_quoted_by_all_others(found, case, failed):
    """The other processes notice it before they have done what they do alone."""
    for index, process in enumerate(found[case]):
        assert process["code"] == 1 and process["seconds"] < 30, process
        if index == failed:
            assert process["said"] == "ValueError: no numbers\n"
        else:
            assert f"process {failed} (host " in process["said"]
            assert " failed: ValueError: no numbers" in process["said"]


@pytest.mark.subprocess
def test_processes_that_fail_alike_say_it_once(found):
    assert [process["said"] for process in found["failed alike"]] == ["LosaError: the same everywhere\n"] * 3


@pytest.mark.subprocess
def test_all_processes_stop_where_one_was_asked_to(found):
    for process in found["asked to stop"]:
        assert process["code"] == 75
        assert process["said"] == "Stopped: stopped by SIGUSR1; run again with --resume\n"
