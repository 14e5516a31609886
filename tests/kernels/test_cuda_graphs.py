"""Who captures where, and what waits meanwhile, on fakes of CUDA's streams and graphs."""

from __future__ import annotations

import threading

import pytest
import torch

from losa_kernels import cuda_graphs, measured
from losa_kernels.pruning import factor
from losa_kernels.pruning.graph import CudaCapture
from tests.helpers.fake_cuda import FakeCuda


def test_streams_and_graphs_of_recorders(monkeypatch):
    fake, device = FakeCuda(monkeypatch), torch.device("cuda:1")
    where = []
    one, two = cuda_graphs.Recorder(device), cuda_graphs.Recorder(device)
    replays = [recorder(lambda: where.append(fake.current)) for recorder in (one, one, two)]
    assert where[0] == where[1] != where[2] and fake.current == "user"
    for replay in replays:
        replay()
    one.close()
    one.close()
    assert fake.log == ["replay"] * 3 + ["synchronize", "reset", "reset"]
    with pytest.raises(ZeroDivisionError):
        two(lambda: 1 / 0)
    assert fake.current == "user" and len(cuda_graphs._broken) == 1
    cuda_graphs.Recorder(device)(lambda: where.append(fake.current))
    assert where[3] == where[0], "the stream of what was closed"
    del two, replays
    cuda_graphs.Recorder(device)(lambda: where.append(fake.current))
    assert where[4] in (where[0], where[2]) and fake.made == 2, "and of what was dropped"


def test_a_replay_returns_what_the_capture_made(monkeypatch):
    fake, recorder = FakeCuda(monkeypatch), cuda_graphs.Recorder(torch.device("cuda:0"))
    runs = []
    replay = recorder(lambda: runs.append(fake.current) or len(runs), run_before=True)
    assert [replay(), replay()] == [2, 2] and fake.log == ["side waits", "user waits", "replay", "replay"]
    before, captured = runs
    assert before != captured and fake.current == "user"


def test_streams_run_out(monkeypatch):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "STREAMS", 3)
    monkeypatch.setattr(cuda_graphs, "_taken", {(0, n) for n in range(1, 9)})
    with pytest.raises(RuntimeError, match="no stream is left of torch's 3"):
        cuda_graphs.Recorder(torch.device("cuda:0"))(lambda: None)


def test_no_capture_on_a_stream_that_factors(monkeypatch):
    """Not even when torch's streams come round again."""
    fake, device, where = FakeCuda(monkeypatch), torch.device("cuda:0"), []
    monkeypatch.setattr(factor, "_kept_streams", {})
    made = fake.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda: setattr(fake, "made", fake.made % 8) or made())
    factoring = {stream.cuda_stream for stream in factor._streams(device)}
    for _ in range(4):
        torch.cuda.Stream()  # a user's
    recorders = [cuda_graphs.Recorder(device) for _ in range(4)]
    for recorder in recorders:
        recorder(lambda: where.append(fake.current))
    assert len({*where, *factoring}) == 8


def waiting(work):
    """A thread that was given time to do the work; what does not wait for a lock has done it."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(0.2)
    return thread


@pytest.mark.parametrize("what", ["another capture", "closing", "a sweep's capture", "a measurement"])
def test_what_waits_for_a_capture_in_another_thread(monkeypatch, what):
    fake, device = FakeCuda(monkeypatch), torch.device("cuda:0")
    monkeypatch.setattr(measured, "_choices", {})
    monkeypatch.setattr(
        measured, "_measure", lambda *args: fake.log.append(what) or measured.Choice(*args[:2], device, 1, {})
    )
    monkeypatch.setattr(measured, "allowed", lambda: True)
    other = cuda_graphs.Recorder(device)
    other(lambda: None)
    works = {
        "another capture": lambda: other(lambda: fake.log.append(what)),
        "closing": other.close,
        "a sweep's capture": lambda: CudaCapture()(lambda: fake.log.append(what), device),
        "a measurement": lambda: measured.fastest("op", (), {1: None, 2: None}, device, 1),
    }
    threads = []

    def function():
        threads.append(waiting(works[what]))
        assert fake.log == [] and threads[0].is_alive()

    recorder = cuda_graphs.Recorder(device)
    recorder(function)
    threads[0].join()
    assert fake.log[0] in (what, "synchronize", "side waits")
