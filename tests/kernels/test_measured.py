"""Choice by measurement, with fakes of what it asks of CUDA."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from losa_kernels import measured

DEVICE = torch.device("cuda", 0)


class Cuda:
    """A clock that runs moved on, behind torch.cuda's events; ``log`` has what was launched in which order."""

    def __init__(self, monkeypatch):
        self.now, self.log, self.capturing, self.broken, self.current = 0.0, [], False, False, 0
        monkeypatch.setattr(measured, "_choices", {})
        monkeypatch.delenv("LOSA_AUTOTUNE", raising=False)
        properties = SimpleNamespace(L2_cache_size=4096)
        for name, value in {
            "device": self.device,
            "current_device": lambda: self.current,
            "get_device_properties": lambda device: properties,
            "is_current_stream_capturing": lambda: self.capturing,
            "synchronize": self.synchronize,
            "Event": lambda enable_timing: Event(self),
            "_sleep": lambda cycles: self.log.append(cycles),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", self.empty)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    def synchronize(self):
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty(self, count, dtype, device):
        self.log.append(("flush buffer", count * dtype.itemsize))
        return SimpleNamespace(sum=lambda: self.log.append("flush"))

    def candidate(self, name, milliseconds, device=DEVICE.index):
        def run():
            assert self.current == device, "the candidate's device is current"
            self.log.append(name)
            self.now += milliseconds
            return name

        return run


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.time = self.cuda.now

    def synchronize(self):
        self.cuda.synchronize()

    def elapsed_time(self, after):
        return after.time - self.time


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def two(cuda, device=DEVICE.index):
    return {"slow": cuda.candidate("slow", 2.0, device), "fast": cuda.candidate("fast", 1.0, device)}


def test_the_fastest_is_measured_once(cuda):
    for _ in range(2):
        assert measured.fastest("op", (1, 2), two(cuda), DEVICE, "slow") == "fast"
    assert cuda.log.count("slow") == cuda.log.count("fast") == measured.WARM_UP + measured.RUNS
    (choice,) = measured.choices()
    assert choice == ("op", (1, 2), DEVICE, "fast", {"slow": 2.0, "fast": 1.0})
    measured.forget()
    assert measured.choices() == []
    assert measured.fastest("op", (1, 2), two(cuda), DEVICE, "slow") == "fast"
    assert cuda.log.count("slow") == 2 * (measured.WARM_UP + measured.RUNS)


def test_other_keys_ops_and_devices_are_measured_apart(cuda):
    places = [
        ("op", (1,), DEVICE),
        ("op", (2,), DEVICE),
        ("other", (1,), DEVICE),
        ("op", (1,), torch.device("cuda", 1)),
    ]
    for op, key, device in places:
        assert measured.fastest(op, key, two(cuda, device.index), device, "slow") == "fast"
    assert [choice[:3] for choice in measured.choices()] == places


def test_every_run_stands_behind_a_busy_device_and_a_cold_cache(cuda):
    measured.fastest("op", (), two(cuda), DEVICE, "slow")
    start = cuda.log.index(("flush buffer", measured.FLUSHED * 4096))
    assert cuda.log[:start] == ["slow"] * measured.WARM_UP
    assert cuda.log[start + 1 : start + 7] == [measured.BACKLOG, "flush", "slow"] * 2


def test_the_device_waits_longer_for_a_slow_host(cuda, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(measured.time, "perf_counter", lambda: next(clock) * 0.001)
    measured.fastest("op", (), two(cuda), DEVICE, "slow")
    assert int(measured.BACKLOG_PER_SECOND * 0.001) in cuda.log and measured.BACKLOG not in cuda.log


@pytest.mark.parametrize("error", [RuntimeError("PTXAS"), torch.OutOfMemoryError("out of memory")])
def test_a_candidate_that_fails_is_passed_over(cuda, error):
    def fail():
        raise error

    candidates = {"failing": fail, **two(cuda)}
    assert measured.fastest("op", (), candidates, DEVICE, "failing") == "fast"
    assert measured.choices()[0].times["failing"] == float("inf")
    assert measured.fastest("all", (), {"a": fail, "b": fail}, DEVICE, "b") == "b"


def test_a_broken_device_is_an_error_and_no_choice(cuda):
    def break_it():
        cuda.broken = True

    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured.fastest("op", (), {"breaks": break_it, **two(cuda)}, DEVICE, "slow")
    assert measured.choices() == []


def test_a_capture_takes_what_is_known_or_the_table(cuda):
    cuda.capturing = True
    assert measured.fastest("op", (), two(cuda), DEVICE, "slow") == "slow"
    assert cuda.log == [] and measured.choices() == []
    cuda.capturing = False
    assert measured.fastest("op", (), two(cuda), DEVICE, "slow") == "fast"
    cuda.capturing, before = True, len(cuda.log)
    assert measured.fastest("op", (), two(cuda), DEVICE, "slow") == "fast" and len(cuda.log) == before


def test_the_table_where_measuring_is_not_wanted(cuda, monkeypatch):
    assert measured.fastest("op", (), {"only": None}, DEVICE, "only") == "only"
    assert measured.fastest("op", (), two(cuda), torch.device("cpu"), "slow") == "slow"
    measured.fastest("op", (), two(cuda), DEVICE, "slow")
    with monkeypatch.context() as patch:
        patch.setenv("LOSA_AUTOTUNE", "0")
        assert not measured.allowed() and measured.fastest("op", (), two(cuda), DEVICE, "slow") == "slow"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert not measured.allowed() and measured.fastest("op", (), two(cuda), DEVICE, "slow") == "slow"
    assert measured.fastest("op", (), two(cuda), DEVICE, "slow") == "fast"


def test_a_candidate_may_choose_among_parts_of_its_own(cuda):
    def nested():
        parts = two(cuda)
        return parts[measured.fastest("part", (), parts, DEVICE, "slow")]()

    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            measured.fastest("op", (), {"nested": nested, "slow": cuda.candidate("slow", 2.0)}, DEVICE, "slow")
        ),
        daemon=True,
    )
    thread.start()
    thread.join(10)
    assert found == ["nested"], "no thread waits for itself"
    assert [choice.op for choice in measured.choices()] == ["part", "op"]
    assert measured.choices()[1].times == {"nested": 1.0, "slow": 2.0}, "the parts are not timed with it"


def test_threads_measure_one_at_a_time_and_once(cuda):
    inside, overlaps, results = threading.Lock(), [], []

    def run():
        if not inside.acquire(blocking=False):
            overlaps.append(True)
            return
        cuda.now += 1
        inside.release()

    def call():
        results.append(measured.fastest("op", (), {"a": run, "b": run}, DEVICE, "b"))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps and len(set(results)) == 1 and len(measured.choices()) == 1
