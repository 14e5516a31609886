"""Graphs of sweeps on a GPU: the plain loop's bits, and what captures leave behind."""

from __future__ import annotations

import logging

import pytest
import torch

from losa_kernels import native, sparsegpt_prune
from losa_kernels.pruning import blocks, cuda, graph
from tests.helpers.sweep_graphs import problem, same, sweep

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


class Counting(graph.CudaCapture):
    """CUDA graphs, and how many replays there were."""

    replays = 0

    def __call__(self, function, device):
        recording = super().__call__(function, device)

        def replay():
            self.replays += 1
            return recording()

        replay.close = recording.close
        return replay


@pytest.fixture
def counting(monkeypatch):
    counting = Counting()
    monkeypatch.setattr(cuda, "graphs", graph.SweepGraphs(counting))
    return counting


@pytest.mark.gpu
@pytest.mark.parametrize("trailing", ["fp32", "3xtf32"])
@pytest.mark.parametrize(("keep_n", "m", "sparsity"), [(2, 4, None), (3, 8, None), (6, 16, None), (None, None, 0.6)])
@pytest.mark.parametrize(("rows", "columns"), [(100, 400), (1030, 1024)])
def test_graphs_equal_the_plain_loop_on_gpu(counting, plain, monkeypatch, rows, columns, keep_n, m, sparsity, trailing):
    monkeypatch.setenv("LOSA_TRAILING", trailing)
    for masked in (False, True):
        problems = [problem(seed, rows, columns, masked, "cuda") for seed in range(4)]
        expected = [plain(given, keep_n, m, 128, sparsity) for given in problems]
        found = [sweep(given, keep_n, m, 128, sparsity) for given in problems]
        assert all(map(same, found, expected))
    assert counting.replays == 6


@pytest.mark.gpu
def test_graphs_outlive_those_that_go_on_gpu(counting, plain):
    """Each graph's workspace is its own: the others replay as before when it goes, whatever takes its memory."""
    shapes = [(64 * (i + 1), 512) for i in range(graph.KEPT + 2)]
    for turn in range(4):
        for i, (rows, columns) in enumerate(shapes):
            given = problem(turn, rows, columns, device="cuda")
            torch.full((1 << 24,), float("nan"), device="cuda")
            assert same(sweep(given, block_size=128), plain(given, block_size=128)), (turn, i)
            torch.cuda.empty_cache()
    assert counting.replays == len(shapes) + 2 * graph.KEPT


@pytest.mark.gpu
def test_streams_have_graphs_of_their_own_on_gpu(counting, plain):
    problems = [problem(seed, 256, 512, device="cuda") for seed in range(3)]
    expected = [plain(given, block_size=128) for given in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found = []
    for _ in range(3):
        for stream, given in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(sweep(given, block_size=128))
    torch.cuda.synchronize()
    assert all(map(same, found, 3 * expected)) and counting.replays == 6


@pytest.mark.gpu
def test_inside_another_capture_on_gpu(counting, plain):
    given, other = (problem(seed, 100, 512, device="cuda") for seed in (0, 1))
    sweep(given)
    sweep(given)
    static = [tensor.clone() for tensor in given[:2]] + [None]
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        results = sweep(static)
    for tensor, value in zip(static[:2], other[:2], strict=True):
        tensor.copy_(value)
    outer.replay()
    assert same(results, plain(other)) and counting.replays == 1


@pytest.mark.gpu
def test_a_capture_that_fails_on_gpu_leaves_no_trace(counting, plain, monkeypatch, caplog):
    given, run = problem(0, 100, 512, device="cuda"), blocks.column_sweep

    def reading(*args, **kwargs):
        results = run(*args, **kwargs)
        float(results[2].sum())  # no capture allows that
        return results

    stream = torch.cuda.current_stream()
    with monkeypatch.context() as context, caplog.at_level(logging.WARNING, logger="losa_kernels"):
        context.setattr(blocks, "column_sweep", reading)
        for _ in range(3):
            assert same(sweep(given), plain(given))
            assert torch.cuda.current_stream() == stream
    assert sum("no CUDA graph" in record.message for record in caplog.records) == 1
    other = problem(1, 101, 512, device="cuda")
    for _ in range(3):
        assert same(sweep(other), plain(other))
    assert counting.replays == 2


@pytest.mark.gpu
def test_prune_is_the_same_at_every_call_on_gpu(counting):
    x = torch.randn(1024, 512, device="cuda")
    weight = torch.randn(300, 512, device="cuda")
    found = [sparsegpt_prune(weight, x.T @ x, keep_n=2, m=4) for _ in range(4)]
    assert all(same(result[:3], found[0][:3]) for result in found) and counting.replays == 3
