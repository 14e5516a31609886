"""Timing and result rows shared by the microbenchmarks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._machine import machine as machine
from benchmarks._machine import origin as origin
from losa_kernels.timing import copy_bandwidth as copy_bandwidth
from losa_kernels.timing import wait

SHAPES = {
    "smollm2": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "llama2-7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "llama2-13b": [(5120, 5120), (13824, 5120), (5120, 13824)],
}

BACKLOG_CYCLES = 4_000_000  # about two milliseconds of a GPU's time
# Short kernels are timed in bursts: between two events lie some 2 us even where nothing runs.
BURST_SECONDS, LONGEST_BURST = 200e-6, 20
# Of the cache: bytes that a candidate goes through before it meets the same data again. A CPU's is taken as 24 MB.
TIMES_CACHE, CPU_CACHE = 4, 24 << 20


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=doc)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine's description")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def beyond_cache(device: str | torch.device) -> int:
    """Bytes to rotate through so that nothing is in the cache when its turn comes again."""
    if torch.device(device).type == "cuda":
        return TIMES_CACHE * torch.cuda.get_device_properties(device).L2_cache_size
    return TIMES_CACHE * CPU_CACHE


def rotation(nbytes: int, device: str | torch.device, repetitions: int) -> int:
    """How many things of that size to rotate through: at least two, and no more than ``repetitions`` come to."""
    runs = (repetitions + 1) * (LONGEST_BURST if torch.device(device).type == "cuda" else 1)
    return max(2, min(runs, -(-beyond_cache(device) // max(1, nbytes))))


@contextlib.contextmanager
def setting(name: str, value: str):
    """An environment variable that a kernel reads at every call."""
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
    """Seconds of every candidate, taken in turns so that drift of a noisy machine hits all alike, each time in another
    order: what runs just before leaves caches and threads in its own state.

    A candidate gets the repetition's number, to rotate buffers larger than the cache.
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
    """How many runs to time together."""
    if not device.startswith("cuda"):
        return 1
    run(-1)
    return max(1, min(LONGEST_BURST, round(BURST_SECONDS / seconds(run, -1, device))))


def seconds(run: Callable[[int], object], repetition: int, device: str, burst: int = 1) -> float:
    """Of one run. On a GPU between two events behind a backlog, so that the host's time to launch does not count."""
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
    """Until the host has launched a run on an idle GPU: what a backlog hides, and a lone run does not. Of a run that
    waits for the GPU, its whole time."""
    times = []
    for i in range(runs):
        wait(device)
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
    wait(device)
    return statistics.median(times)


def kernel_seconds(run: Callable[[int], object], runs: int) -> float | None:
    """What kernels and copies of one run take on the GPU, without gaps. None where the profiler may not look."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(runs):
            run(i)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / runs or None


def product_rate(device: str, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP/s of a large square product, the limit of compute-bound kernels on this machine."""
    side = side or (8192 if device.startswith("cuda") else 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    times = interleaved({"product": lambda _: torch.mm(left, right, out=out)}, 7, device)["product"]
    return 2 * side**3 / statistics.median(times)


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most bytes that torch's allocator holds during ``run`` above what it held before."""
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


def rows(times: dict[str, list[float]], baseline: str, **fields) -> list[dict]:
    base = statistics.median(times[baseline])
    return [
        {
            **fields,
            "implementation": name,
            "median_ms": 1e3 * statistics.median(values),
            "min_ms": 1e3 * min(values),
            f"speedup_over_{baseline}": base / statistics.median(values),
        }
        for name, values in times.items()
    ]


def report(name: str, results: Iterable[dict], path: Path | None, device: str) -> None:
    """Print the rows as a table; write them with the machine's description as JSON, again after each row, so that a
    benchmark that is ended leaves what it has measured."""
    document = {"benchmark": name, "machine": machine(device), "origin": origin(), "rows": []}
    found = document["rows"]
    for row in results:
        found.append(row)
        if path is not None:
            write_rows(path, document)
    columns = list(dict.fromkeys(key for row in found for key in row))
    table = Table(*columns, title=name)
    for row in found:
        cells = (row.get(c, "") for c in columns)
        table.add_row(*(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=200).print(table)


def write_rows(path: Path, document: dict) -> None:
    """JSON, whole or not at all; a line for each of the document's "rows"."""
    text = json.dumps(document | ({"rows": []} if "rows" in document else {}), indent=1)
    if document.get("rows"):
        lines = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
        text = text.replace('"rows": []', f'"rows": [\n{lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text + "\n")
    temporary.replace(path)
