"""Sweeps through a recorded loop: the plain loop's bits, from inputs of this call, in memory of the caller's own.

On the CPU a recorder stands in for CUDA graphs, whose replay is the function once more on the memory of the capture.
"""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from losa_kernels import native
from losa_kernels.pruning import cuda, graph
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.sweep_graphs import problem, same, sweep

pytestmark = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


class Recording:
    def __init__(self, function, closed):
        self.function, self.closed = function, closed
        self.results = function()

    def __call__(self):
        assert not self.closed[id(self)]
        for held, new in zip(self.results, self.function(), strict=True):
            held.copy_(new)
        return self.results

    def close(self):
        self.closed[id(self)] = True


class Recorder:
    def __init__(self):
        self.here, self.error = "here", None
        self.attempts, self.recordings, self.closed = 0, [], {}

    def place(self, device):
        return self.here

    def __call__(self, function, device):
        self.attempts += 1
        if self.error is not None:
            raise self.error
        self.recordings.append(Recording(function, self.closed))
        self.closed[id(self.recordings[-1])] = False
        return self.recordings[-1]

    @property
    def open(self):
        return [not self.closed[id(recording)] for recording in self.recordings]


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda, "graphs", graph.SweepGraphs(recorder))
    return recorder


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.6])
@pytest.mark.parametrize("trailing", ["fp32", "3xtf32"])
def test_every_call_has_the_bits_of_the_plain_loop(recorder, plain, monkeypatch, masked, trailing, sparsity):
    """The masks differ in how much they have lost already: counts are each call's own."""
    monkeypatch.setenv("LOSA_TRAILING", trailing)
    problems = [problem(seed, masked=masked) for seed in range(5)]
    expected = [plain(given, sparsity=sparsity) for given in problems]
    assert not any(same(a, b) for a in expected for b in expected if a is not b)
    found = []
    for given in problems:
        originals = [None if tensor is None else tensor.clone() for tensor in given]
        found.append(sweep(given, sparsity=sparsity))
        assert all(a is None or torch.equal(a, b) for a, b in zip(given, originals, strict=True))
    assert recorder.attempts == 1
    # Compared after the last call, so that no result may live in memory that later calls write to.
    assert all(map(same, found, expected))


def test_one_graph_for_every_sparsity(recorder, plain):
    """Blocks may have a sparsity each, and none is worth a capture of its own."""
    for turn, sparsity in enumerate((0.5, 0.6, 0.7, 0.0, 0.55)):
        given = problem(turn, masked=True)
        assert same(sweep(given, sparsity=sparsity), plain(given, sparsity=sparsity)), sparsity
    assert recorder.attempts == 1


def test_closed_graphs_are_made_anew(recorder, plain):
    for turn in range(2):
        for seed in range(3):
            assert same(sweep(problem(seed)), plain(problem(seed)))
        assert recorder.attempts == turn + 1 and recorder.open[turn]
        cuda.graphs.close()
        assert not any(recorder.open)


def test_the_first_call_records_nothing(recorder):
    given = problem(0)
    sweep(given)
    assert recorder.attempts == 0
    sweep(given)
    sweep(given)
    assert recorder.attempts == 1


def test_the_weight_is_given_up_and_strides_do_not_matter(recorder, plain):
    weight, factor, mask = problem(0, masked=True)
    expected = plain((weight, factor, mask))
    strided = [weight.T.contiguous().T, factor.T.contiguous().T, mask.T.contiguous().T]
    for _ in range(3):
        assert same(sweep(strided), expected)
    ours = weight.clone()
    assert cuda.column_sweep(ours, factor, None, 2, 4, 16, mask)[0].data_ptr() == ours.data_ptr()
    assert recorder.attempts == 1


VARIANTS = {
    "plain": ({}, {}, "fp32", "here"),
    "rows": ({"rows": 13}, {}, "fp32", "here"),
    "columns": ({"columns": 80}, {}, "fp32", "here"),
    "mask": ({"masked": True}, {}, "fp32", "here"),
    "keep_n": ({}, {"keep_n": 1}, "fp32", "here"),
    "m": ({}, {"m": 8}, "fp32", "here"),
    "block_size": ({}, {"block_size": 32}, "fp32", "here"),
    "sparsity": ({}, {"sparsity": 0.5}, "fp32", "here"),
    "trailing": ({}, {}, "3xtf32", "here"),
    "place": ({}, {}, "fp32", "there"),
}


def test_keys_do_not_mix(plain, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda, "graphs", graph.SweepGraphs(recorder, kept=len(VARIANTS)))
    for turn in range(4):
        for name, (shape, pattern, trailing, place) in VARIANTS.items():
            monkeypatch.setenv("LOSA_TRAILING", trailing)
            recorder.here = place
            given = problem(turn, **shape)
            assert same(sweep(given, **pattern), plain(given, **pattern)), (name, turn)
        assert recorder.attempts == (len(VARIANTS) if turn else 0)


def test_the_least_recently_used_graph_goes_and_does_not_come_back(plain, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(cuda, "graphs", graph.SweepGraphs(recorder, kept=2))

    def call(rows):
        given = problem(len(recorder.recordings), rows=rows)
        assert same(sweep(given), plain(given))

    for rows in (1, 1, 2, 2, 1):
        call(rows)
    assert recorder.open == [True, True]
    call(3)
    assert recorder.open == [True, True], "a first call costs no graph"
    call(3)
    assert recorder.open == [True, False, True]
    for rows in (1, 2, 2, 3, 1):
        call(rows)
    assert recorder.open == [True, False, True] and recorder.attempts == 3


def test_a_failure_is_logged_once_and_the_loop_serves(recorder, plain, caplog):
    recorder.error = RuntimeError("not while it rains")
    given = problem(0, masked=True)
    with caplog.at_level(logging.WARNING, logger="losa_kernels"):
        for _ in range(4):
            assert same(sweep(given), plain(given))
    assert recorder.attempts == 1
    assert [record.message.count("not while it rains") for record in caplog.records] == [1]
    recorder.error = None
    other = problem(1)
    for _ in range(3):
        assert same(sweep(other), plain(other))
    assert recorder.attempts == 2 and recorder.open == [True]


def test_what_runs_without_graphs(recorder, monkeypatch):
    given = problem(0)

    def attempts(call=lambda: sweep(given)):
        before = recorder.attempts
        for _ in range(3):
            call()
        return recorder.attempts - before

    with monkeypatch.context() as context:
        context.setenv("LOSA_SWEEP_GRAPH", "0")
        assert attempts() == 0
    with monkeypatch.context() as context:
        context.setattr(graph, "LARGEST", 4 * (12 * 64 + 64 * 64) - 1)
        assert attempts() == 0
    with monkeypatch.context() as context:
        context.setattr(recorder, "here", None)
        assert attempts() == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert attempts() == 0
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(graph, "LARGEST", 4 * (12 * 64 + 64 * 64))
    assert attempts() == 1


def test_inference_mode_and_outside(recorder, plain):
    given, other = problem(0, masked=True), problem(1, masked=True)
    with torch.inference_mode():
        for _ in range(2):
            sweep(given)
    assert same(sweep(other), plain(other)) and recorder.attempts == 1


def test_threads_take_turns(recorder, plain):
    problems = [problem(seed) for seed in range(4)]
    expected = [plain(given) for given in problems]
    sweep(problems[0])
    right = []

    def work(index):
        right.append(all(same(sweep(problems[index]), expected[index]) for _ in range(20)))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4 and recorder.attempts == 1


def test_streams_of_captures(monkeypatch):
    fake, device = FakeCuda(monkeypatch), torch.device("cuda:0")
    capture = graph.CudaCapture()
    assert capture.place(torch.device("cpu")) is None
    assert capture.place(device) == (device, "user")
    fake.capturing = True
    assert capture.place(device) is None
    streams = []

    def function():
        streams.append(fake.current)
        fake.log.append("function")
        return streams[-1]

    first = capture(function, device)
    assert fake.log == ["side waits", "function", "user waits", "function"] and fake.current == "user"
    second = capture(function, device)
    warm, one, _, two = streams
    assert streams[2] == warm and len({warm, one, two}) == 3 and fake.made == 3
    del fake.log[:]
    assert first() == one and second() == two and fake.log == ["replay", "replay"]
    first.close()
    assert fake.log[2:] == ["synchronize", "reset"]

    def failing():
        function()
        if fake.current != warm:
            raise KeyError

    with pytest.raises(KeyError):
        capture(failing, device)
    assert fake.current == "user"
    capture(function, device)
    assert streams[4:] == [warm, one, warm, one], "the stream of what was closed, also after a failure"
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 / 0, device)
    assert fake.log[-2:] == ["user waits", "synchronize"] and fake.current == "user" and fake.made == 3
