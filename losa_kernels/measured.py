"""Choice by measurement: where several implementations compute the same, the first call of a shape times them all and
the later calls take the fastest, so that no card runs what is slower on it than its best alternative.

With ``LOSA_AUTOTUNE=0``, and in torch's deterministic mode, the op's table decides and nothing is timed. While a stream
records a CUDA graph nothing can be timed: an earlier measurement decides, or the table.

What is timed is the device alone. Each run stands behind work that keeps the device busy until the host has launched
the run, since a captured graph or a training step hides the launches of the host in the same way.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from losa_kernels import settings
from losa_kernels.cuda_graphs import capturing

logger = logging.getLogger("losa_kernels")

RUNS = 9
WARM_UP = 2
FLUSHED = 2  # times the L2 cache: what a run finds there is not what the run before left
# Cycles for which the device waits before each run: at least, for a second on the host, and at most. 2^20 are 0.5 ms at
# 2 GHz, and no present device is clocked at 4 GHz.
BACKLOG, BACKLOG_PER_SECOND, LONGEST_BACKLOG = 1 << 20, 4e9, 1 << 26

Name = TypeVar("Name", bound=Hashable)


class Choice(NamedTuple):
    """What one measurement found: milliseconds of every candidate, inf where it failed."""

    op: str
    key: tuple
    device: torch.device
    chosen: Any
    times: dict[Any, float]


_choices: dict[tuple, Choice] = {}


def choices() -> list[Choice]:
    """All measurements of this process so far, in the order in which they were made."""
    return list(_choices.values())


def forget() -> None:
    """Measure anew from the next calls on."""
    _choices.clear()


def allowed() -> bool:
    """Whether measured choices are wanted: not with ``LOSA_AUTOTUNE=0``, nor in torch's deterministic mode."""
    return settings.AUTOTUNE() and not torch.are_deterministic_algorithms_enabled()


def fastest(
    op: str, key: tuple, candidates: Mapping[Name, Callable[[], object]], device: torch.device, table: Name
) -> Name:
    """The name of the candidate to run.

    Args:
        op, key: what a measurement holds for; every call with both equal has the same candidates.
        candidates: name -> the call to time. Each may run many times, so many runs leave what one leaves: results are
            overwritten, not added to, and no random numbers are drawn. One that raises an exception is passed over.
        device: where the candidates run, with its index.
        table: the candidate where nothing may be measured, or where every candidate fails.

    Raises:
        RuntimeError: a candidate broke the device (an illegal address): no later call would work.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    if device.type != "cuda" or not allowed():
        return table
    place = (op, key, device)
    known = _choices.get(place)
    if known is None:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return table
            with capturing:  # it waits for the device; a candidate may choose among parts of its own
                known = _choices.get(place)
                if known is None:
                    known = _choices[place] = _measure(op, key, candidates, device, table)
    return known.chosen


def _measure(
    op: str, key: tuple, candidates: Mapping[Name, Callable[[], object]], device: torch.device, table: Name
) -> Choice:
    times = {name: _milliseconds(run, f"{op} {key} by {name}") for name, run in candidates.items()}
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] < float("inf") else table
    logger.info("%s %s: %s of %s ms", op, key, chosen, {name: round(took, 4) for name, took in times.items()})
    return Choice(op, key, device, chosen, times)


def _milliseconds(run: Callable[[], object], name: str) -> float:
    """Median of several runs. inf if a run fails: resources that the device has not, memory, a compiler's error."""
    try:
        for _ in range(WARM_UP):
            begun = time.perf_counter()
            run()
            host_seconds = time.perf_counter() - begun
        return statistics.median(_timed(run, host_seconds))
    except Exception as error:
        # A fault of the device outlives the candidate, and no other candidate could run: then this raises.
        torch.cuda.synchronize()
        logger.info("%s cannot run here: %s: %s", name, type(error).__name__, error)
        return float("inf")


def _timed(run: Callable[[], object], host_seconds: float) -> list[float]:
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(FLUSHED * cache // 4, dtype=torch.int32, device="cuda")
    backlog = min(max(BACKLOG, int(BACKLOG_PER_SECOND * host_seconds)), LONGEST_BACKLOG)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for before, after in events:
        torch.cuda._sleep(backlog)
        # Read, not written: the run would pay for writing it back to memory.
        flush.sum()
        before.record()
        run()
        after.record()
    events[-1][1].synchronize()
    return [before.elapsed_time(after) for before, after in events]
