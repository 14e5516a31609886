"""Choice by measurement: where several implementations compute the same, the first call of a shape times them all and
the later calls take the fastest, so that no card runs what is slower on it than its best alternative.

``LOSA_AUTOTUNE`` = ``1`` (default) | ``0``: measure, or take what the op's table says. torch's deterministic mode takes
the table too. While a stream records a CUDA graph nothing can be timed: an earlier measurement decides, or the table.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

from losa_kernels.cuda_graphs import capturing

logger = logging.getLogger("losa_kernels")

RUNS = 9
WARM_UP = 2
FLUSHED = 4  # times the L2 cache: what a run finds there is not what the run before left

Name = TypeVar("Name", bound=Hashable)


class Choice(NamedTuple):
    """What one measurement found: milliseconds of every candidate, inf where it failed."""

    op: str
    key: tuple
    device: torch.device
    chosen: Hashable
    times: dict[Hashable, float]


_choices: dict[tuple, Choice] = {}


def choices() -> list[Choice]:
    """All measurements of this process so far, in the order in which they were made."""
    return list(_choices.values())


def forget() -> None:
    """Measure anew from the next calls on."""
    _choices.clear()


def allowed() -> bool:
    """Whether measured choices are wanted: not with ``LOSA_AUTOTUNE=0``, nor in torch's deterministic mode."""
    return os.environ.get("LOSA_AUTOTUNE", "1").strip() != "0" and not torch.are_deterministic_algorithms_enabled()


def fastest(
    op: str, key: tuple, candidates: Mapping[Name, Callable[[], object]], device: torch.device, table: Name
) -> Name:
    """The name of the candidate to run.

    Args:
        op, key: what a measurement holds for; every call with both equal has the same candidates.
        candidates: name -> the call to time; each may run many times.
        device: where the candidates run.
        table: the candidate where nothing may be measured.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    if device.type != "cuda" or not allowed():
        return table
    place = (op, key, device)
    if (known := _choices.get(place)) is not None:
        return known.chosen
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return table
        with capturing:  # it waits for the device
            if place not in _choices:
                _choices[place] = _measure(op, key, candidates, device, table)
    return _choices[place].chosen


def _measure(
    op: str, key: tuple, candidates: Mapping[Name, Callable[[], object]], device: torch.device, table: Name
) -> Choice:
    times = {name: _milliseconds(run, f"{op} {key} by {name}") for name, run in candidates.items()}
    best = min(times, key=times.__getitem__)
    chosen = best if times[best] < float("inf") else table
    logger.info("%s %s: %s of %s ms", op, key, chosen, {name: round(time, 4) for name, time in times.items()})
    return Choice(op, key, device, chosen, times)


def _milliseconds(run: Callable[[], object], name: str) -> float:
    """Median of several runs, each behind a write that replaces what is in the L2 cache. inf if it fails: resources
    that the device has not, memory, a compiler's error. What is wrong with every candidate shows when one is run."""
    try:
        for _ in range(WARM_UP):
            run()
        return statistics.median(_timed(run))
    except Exception as error:
        logger.warning("%s cannot run here: %s: %s", name, type(error).__name__, error)
        return float("inf")


def _timed(run: Callable[[], object]) -> list[float]:
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flushed = torch.empty(FLUSHED * cache, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for before, after in events:
        # The host launches the run while the device still writes.
        flushed.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]
