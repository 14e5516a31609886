"""Seconds and bytes of the candidates of a benchmark."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable

import torch

from losa_kernels.timing import wait

BACKLOG_CYCLES = 4_000_000  # about two milliseconds of a GPU's time
# Short kernels are timed in bursts: two events with nothing between them are already some 2 us apart.
BURST_SECONDS, LONGEST_BURST = 200e-6, 20
# A candidate goes through so many times the size of the cache before it meets the same data again. A CPU's cache is
# taken as 24 MB.
TIMES_CACHE, CPU_CACHE = 4, 24 << 20
# Rows of the square product that shows how fast a device multiplies.
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def beyond_cache(device: str | torch.device) -> int:
    """Bytes to rotate through, so that data has left the cache when its turn comes again."""
    if torch.device(device).type == "cuda":
        return TIMES_CACHE * torch.cuda.get_device_properties(device).L2_cache_size
    return TIMES_CACHE * CPU_CACHE


def rotation(nbytes: int, device: str | torch.device, repetitions: int) -> int:
    """How many copies of ``nbytes`` to rotate through: at least two, at most one for each run of ``repetitions``."""
    runs = (repetitions + 1) * (LONGEST_BURST if torch.device(device).type == "cuda" else 1)
    return max(2, min(runs, -(-beyond_cache(device) // max(1, nbytes))))


@contextlib.contextmanager
def setting(name: str, value: str):
    """Sets an environment variable that a kernel reads at every call."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def interleaved(
    candidates: dict[str, Callable[[int], object]], repetitions: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every candidate's runs.

    The candidates take turns, so that the drift of a noisy machine hits all alike. Each turn has another order, because
    the candidate that ran just before leaves caches and threads in a state of its own. A candidate gets the number of
    the run, to choose one of the buffers that it rotates through.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    bursts = {name: _burst(run, device) for name, run in candidates.items()}
    order, shuffle = list(candidates.items()), random.Random().shuffle
    for repetition in range(-1, repetitions):
        shuffle(order)
        for name, run in order:
            taken = seconds(run, repetition, device, bursts[name])
            if repetition >= 0:
                times[name].append(taken)
    return times


def _burst(run: Callable[[int], object], device: str) -> int:
    """How many runs of a candidate to time together."""
    if not device.startswith("cuda"):
        return 1
    run(-1)
    return max(1, min(LONGEST_BURST, round(BURST_SECONDS / seconds(run, -1, device))))


def seconds(run: Callable[[int], object], repetition: int, device: str, burst: int = 1) -> float:
    """Seconds of one run, the mean of ``burst``. A GPU's time is taken between two events behind a backlog, so that the
    host's time to launch does not count."""
    wait(device)
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BACKLOG_CYCLES)
        begin.record()
        for i in range(burst):
            run(repetition * burst + i)
        end.record()
        wait(device)
        return begin.elapsed_time(end) / 1e3 / burst
    start = time.perf_counter()
    run(repetition)
    return time.perf_counter() - start


def host_seconds(run: Callable[[int], object], device: str, runs: int = 5) -> float:
    """Seconds until the host has launched a run on an idle GPU, which ``seconds`` does not count. A run that waits for
    the GPU has its whole time counted."""
    times = []
    for i in range(runs):
        wait(device)
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
    wait(device)
    return statistics.median(times)


def kernel_seconds(run: Callable[[int], object], runs: int) -> float | None:
    """Seconds of the kernels and copies of one run on the GPU, without the gaps between them. None where the profiler
    has no permission."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(runs):
            run(i)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / runs or None


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the limit of compute-bound kernels on this machine."""
    side = PRODUCT_SIDE[torch.device(device).type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = interleaved({"product": lambda _: torch.mm(left, right, out=out)}, 7, device)["product"]
    return 2 * side**3 / statistics.median(times)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes that torch's allocator holds during ``run``, above what it held before."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
