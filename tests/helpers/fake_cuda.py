"""CUDA streams and graphs for tests of who captures where, without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

from losa_kernels import cuda_graphs


class FakeCuda:
    """The parts of torch.cuda that our captures use, on names for streams; ``log`` has what ran where."""

    def __init__(self, monkeypatch):
        self.current, self.made, self.log, self.capturing = "user", 0, [], False
        for name in ("device", "stream", "graph", "Stream", "CUDAGraph", "current_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        for name, none in (("_taken", set()), ("_free", {}), ("_beside", {}), ("_broken", [])):
            monkeypatch.setattr(cuda_graphs, name, none)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def device(self, device):
        return contextlib.nullcontext()

    def Stream(self):
        self.made += 1
        return SimpleNamespace(cuda_stream=self.made, wait_stream=lambda other: self.log.append("side waits"))

    def current_stream(self, device=None):
        return SimpleNamespace(cuda_stream=self.current, wait_stream=lambda other: self.log.append("user waits"))

    def synchronize(self, device):
        self.log.append("synchronize")

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"), reset=lambda: self.log.append("reset"))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.cuda_stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.current = stream.cuda_stream
        yield
        self.current = "side"  # and like torch's it stays where it is when the body fails
