"""What the machine can do, for estimates: its rate of matrix products and its memory."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch


def product_rate(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> float:
    """FLOP/s of products of a batch of tokens and a linear's weight (outputs, inputs).

    A CPU computes in fp32 whatever the dtype of the weights. Sides are cut so that one product takes well under a
    second.
    """
    on_cpu = device.type == "cpu"
    limit = 4096 if on_cpu else 16384
    rows, inner, columns = 512 if on_cpu else 8192, min(inputs, limit), min(outputs, limit)
    dtype = torch.float32 if on_cpu else dtype
    x, weight = (torch.rand(n, inner, device=device, dtype=dtype) for n in (rows, columns))
    times: list[float] = []
    stop = time.perf_counter() + 1.0
    while len(times) < 4 or (time.perf_counter() < stop and len(times) < 1000):
        start = time.perf_counter()
        x @ weight.T
        if not on_cpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    # The first product pays for set-up.
    return 2.0 * rows * inner * columns / statistics.median(times[1:])


# A container's limit, of both versions of control groups.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _limit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file; "max"
        return None


def capacity(device: torch.device | None) -> dict[str, int]:
    """Bytes of memory by place, "host" (of the machine, or of a container that has less) and "device", where known."""
    found = {}
    limits = [limit for path in _LIMITS if (limit := _limit(path)) is not None]
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if limits:
        found["host"] = min(limits)
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_properties(device).total_memory
    return found
