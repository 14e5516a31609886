"""What the machine can do, for estimates: its rate of matrix products and its memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


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


def capacity(device: torch.device | None) -> dict[str, int]:
    """Bytes of memory by place, where known: "host" (of the machine, or of a container that has less), "process" (what
    this process may map of it, by ``ulimit -v``) and "device"."""
    found = dict(_address_space())
    limits = list(_limits())
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if limits:
        found["host"] = min(limits)
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _address_space() -> Iterator[tuple[str, int]]:
    with suppress(ImportError):  # Windows
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield "process", limit


def _limits() -> Iterator[int]:
    """Of the control groups that this process is in, as containers, batch systems and services set them."""
    groups = {_GROUPS, _GROUPS / "memory"}
    with suppress(OSError):
        for line in _OWN_GROUP.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            root = _GROUPS if not kinds else _GROUPS / "memory"
            if not kinds or "memory" in kinds.split(","):
                own = root / path.lstrip("/")
                groups |= {each for each in (own, *own.parents) if each.is_relative_to(root)}
    for group in groups:
        # The file's name in each version of control groups; "max" is no limit.
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                yield int((group / name).read_text())
