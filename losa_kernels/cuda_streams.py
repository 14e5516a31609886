"""Streams for captures that nobody else captures on.

cuBLAS has one workspace per stream. Graphs captured on the same stream share it, and torch frees it with the first of
them (github.com/pytorch/pytorch/issues/193402).
"""

from __future__ import annotations

import threading

import torch

POOL = 32  # streams that torch hands out in turn

_taken: set[tuple[int, int]] = set()
_lock = threading.Lock()


def private_stream() -> torch.cuda.Stream:
    """A stream of the current device that no other call has returned. It is never given back: keep it for later use.

    Raises:
        RuntimeError: torch has no other.
    """
    with _lock:
        for _ in range(POOL):
            stream = torch.cuda.Stream()
            key = (getattr(stream, "device_index", 0), stream.cuda_stream)
            if key not in _taken:
                _taken.add(key)
                return stream
    raise RuntimeError(f"no stream is left of torch's {POOL}")
