"""The loop over column blocks as a CUDA graph: one launch where Python would start two kernels or more per block.

The loop reads nothing back from the device. A graph works on memory of its own, with inputs copied in and results
copied out: the same kernels on the same values as without a graph. It is captured at the second call of a key (stream,
shapes, pattern, block size, mask or none, trailing product), so that what is pruned once pays nothing, and at no later
call: more than ``KEPT`` keys in rotation would otherwise be captured again and again. How many entries go from
each column block is an input, since every transformer block may have a sparsity of its own.

``LOSA_SWEEP_GRAPH=0`` turns graphs off; so does torch's deterministic mode, where results must not depend on what ran
before.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from losa_kernels import cuda_graphs, settings

logger = logging.getLogger("losa_kernels")

KEPT = 4  # graphs in a process, the least recently used goes; as many as a transformer block has shapes of linears
# Bytes of weight and factor together, as a graph holds them until it goes: 4096x4096 and its factor. Above it, kernels
# should take longer than their launches (an estimate), and a graph would save nothing.
LARGEST = 128 << 20

Results = tuple[Tensor, ...]
Inputs = tuple[Tensor | None, ...]  # the first is a tensor
Loop = Callable[..., Results]


class Recording(Protocol):
    def __call__(self) -> Results:
        """Do what was captured; the results are always the same tensors."""

    def close(self) -> None:
        """Give its memory back; not to be called again."""


class Capture(Protocol):
    def place(self, device: torch.device) -> Hashable | None:
        """Where a recording made now could be replayed without further synchronisation; None: nothing can be made."""

    def __call__(self, function: Callable[[], Results], device: torch.device) -> Recording:
        """Record ``function``, which always works on the same memory; may run it any number of times."""


class SweepGraphs:
    """Runs loops over column blocks through recordings, the ``kept`` most recently used of which it keeps.

    Threads may share it: one at a time copies in, replays and copies out.
    """

    def __init__(self, capture: Capture, kept: int = KEPT):
        self._capture, self._kept = capture, kept
        self._calls: Counter[Hashable] = Counter()  # that found no graph
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        # One lock for all that captures: a measurement may run sweeps while it keeps captures away.
        self._lock = cuda_graphs.capturing

    def run(self, loop: Loop, inputs: Inputs, key: tuple) -> Results:
        """``loop(*inputs)``, which gives the first input up for the first result. ``key``: all that the loop depends on
        in addition to the place and the shapes of its inputs."""
        first = inputs[0]
        assert first is not None
        off = not settings.SWEEP_GRAPH() or torch.are_deterministic_algorithms_enabled()
        too_large = sum(0 if given is None else given.nbytes for given in inputs[:2]) > LARGEST
        place = None if off or too_large else self._capture.place(first.device)
        if place is not None:
            key = (place, *(None if given is None else given.shape for given in inputs), *key)
            with self._lock:
                graph = self._graph(key, loop, inputs)
                if graph is not None:
                    return graph.run(inputs)
        return loop(*inputs)

    def close(self) -> None:
        """Free the graphs and their memory; later calls start anew."""
        with self._lock:
            self._calls.clear()
            while self._graphs:
                self._graphs.popitem()[1].close()

    def _graph(self, key: tuple, loop: Loop, inputs: Inputs) -> _Graph | None:
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._calls[key] += 1
        if self._calls[key] != 2:
            return None
        while len(self._graphs) >= self._kept:
            self._graphs.popitem(last=False)[1].close()
        try:
            self._graphs[key] = _Graph(self._capture, loop, inputs)
        except Exception as error:  # whatever it is: the loop itself will work, or will say what is wrong
            logger.warning("column_sweep: no CUDA graph for %s: %s", key, error)
            return None
        return self._graphs[key]


class _Graph:
    """A recorded loop and the memory that it reads and writes."""

    def __init__(self, capture: Capture, loop: Loop, inputs: Inputs):
        # Made in inference mode they could not be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            own = [
                None if given is None else torch.empty_like(given, memory_format=torch.contiguous_format)
                for given in inputs
            ]
            self._inputs = own
            self._load(inputs)
            assert own[0] is not None
            self._recording = capture(lambda: loop(*own), own[0].device)

    def run(self, inputs: Inputs) -> Results:
        self._load(inputs)
        given, (first, *rest) = inputs[0], self._recording()
        assert given is not None
        return given.contiguous().copy_(first), *(result.clone() for result in rest)

    def close(self) -> None:
        self._recording.close()

    def _load(self, inputs: Inputs) -> None:
        for static, value in zip(self._inputs, inputs, strict=True):
            if static is not None and value is not None:
                static.copy_(value)


class CudaCapture:
    """Captures, each by a recorder of its own: a recording that goes takes its memory along."""

    def place(self, device: torch.device) -> Hashable | None:
        """Device and current stream: on one stream, copies and replays wait for earlier copies and replays."""
        if device.type != "cuda" or cuda_graphs.is_recording(device):
            return None
        return device, torch.cuda.current_stream(device).cuda_stream

    def __call__(self, function: Callable[[], Results], device: torch.device) -> CudaRecording:
        recorder = cuda_graphs.Recorder(device)
        try:
            return CudaRecording(recorder(function, run_before=True), recorder)
        except BaseException:
            recorder.close()
            raise


class CudaRecording:
    def __init__(self, replay: Callable[[], Results], recorder: cuda_graphs.Recorder):
        self._replay, self._recorder = replay, recorder

    def __call__(self) -> Results:
        return self._replay()

    def close(self) -> None:
        self._recorder.close()
