"""CUDA graphs: one recorder for all of them, and one lock for what no capture in the process can stand.

cuBLAS has one workspace per stream. Graphs captured on the same stream share it, and torch frees it with the first of
them (github.com/pytorch/pytorch/issues/193402). So every recorder captures on a stream that no other live recorder has,
and nothing else runs on its stream, so that a workspace, too, comes from the recorder's own memory pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import finalize

import torch

STREAMS = 32  # that torch hands out in turn

Results = TypeVar("Results")

# Held while a thread captures. Who waits for a device, which would break a capture on it, takes the lock before. A
# thread may take it again; who holds it waits for no other lock of this package.
capturing = threading.RLock()

_taken: set[tuple[int, int]] = set()
_free: dict[torch.device, list[torch.cuda.Stream]] = {}
_beside: dict[torch.device, torch.cuda.Stream] = {}  # where functions run before they are captured
# For ever: after a capture that was cut off, torch's allocator may go on asking its graph.
_broken: list[torch.cuda.CUDAGraph] = []


def is_recording(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is being captured."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Recorder:
    """Records functions as CUDA graphs of one device, in one memory pool: the graphs are replayed one at a time, and
    none finds anything that another left there.

    What is dropped without ``close`` gives its stream back too, but nobody waits for its last replay.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # torch's handle
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, function: Callable[[], Results], run_before: bool = False) -> Callable[[], Results]:
        """-> replay, which does what ``function`` did and returns its results, always the same tensors.

        Args:
            function: works on the same memory in every run; reads nothing back from the device.
            run_before: run it once more, before the capture: what is loaded at a first run cannot be captured.

        Raises:
            RuntimeError: the function cannot be captured, or torch has no stream left. The recorder goes on.
        """
        with capturing, torch.cuda.device(self._device):
            if self._stream is None:
                self._open()
            if run_before:
                self._run(function)
            graph = torch.cuda.CUDAGraph()
            try:
                # Where a capture fails, torch may leave its stream the current one.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    results = function()
            except BaseException:
                graph.reset()
                _broken.append(graph)
                raise
            self._graphs.append(graph)

        def replay() -> Results:
            graph.replay()
            return results

        return replay

    def close(self) -> None:
        """Free the recordings' memory; replays must not be called again. The recorder can record anew."""
        if self._stream is None:
            return
        with capturing:
            torch.cuda.synchronize(self._device)
            self._returned()
        self._stream = self._pool = None
        self._graphs = []

    def _open(self) -> None:
        free = _free.setdefault(self._device, [])
        self._stream = free.pop() if free else private_stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._returned = finalize(self, _give_back, self._graphs, self._stream, free)
        self._returned.atexit = False

    def _run(self, function: Callable[[], Results]) -> None:
        if self._device not in _beside:
            _beside[self._device] = private_stream()
        beside, here = _beside[self._device], torch.cuda.current_stream()
        with torch.cuda.stream(beside):
            beside.wait_stream(here)
            try:
                function()
            finally:
                here.wait_stream(beside)


def _give_back(graphs: list[torch.cuda.CUDAGraph], stream: torch.cuda.Stream, free: list[torch.cuda.Stream]) -> None:
    for graph in graphs:
        graph.reset()
    free.append(stream)


def private_stream() -> torch.cuda.Stream:
    """A stream of the current device that no other call has returned: what torch hands out comes round again. It is
    never given back: keep it for later use.

    Raises:
        RuntimeError: torch has no other.
    """
    with capturing:
        for _ in range(STREAMS):
            stream = torch.cuda.Stream()
            key = (getattr(stream, "device_index", 0), stream.cuda_stream)
            if key not in _taken:
                _taken.add(key)
                return stream
    raise RuntimeError(f"no stream is left of torch's {STREAMS}")
