"""Kernels behind one another in a CUDA graph, each of which may start before the one before it is complete."""

from __future__ import annotations

import torch


def check_captured_chain(product, x: torch.Tensor, products: int = 20) -> None:
    """``product``(``product``(... x)) gives the same bits in every replay of a graph as without one."""

    def chain(y):
        for _ in range(products):
            y = product(y)
        return y

    expected = chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(5):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
