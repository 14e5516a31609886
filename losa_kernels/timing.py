"""What every measurement of speed needs: to wait for a device, and the speed of its memory."""

from __future__ import annotations

import statistics
import time

import torch


def wait(device: torch.device | str) -> None:
    """Until the device has done what it was given. A CPU has done it already."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device | str, megabytes: int = 256) -> float:
    """Bytes per second of a large copy (read + write), the limit of memory-bound kernels on this machine.

    Args:
        megabytes: size of the copied tensor; at least 2048 on CUDA, where launches are then 1 % of the time.
    """
    if torch.device(device).type == "cuda":
        megabytes = max(megabytes, 2048)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times[1:])
