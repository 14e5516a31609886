"""Where streams of a model on a GPU wait: in one piece, on the device or in pinned host memory."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm import stream as calibration
from losa.algorithm import stream_storage
from losa.algorithm.stream import BlockStream
from losa.model.blocks import find_blocks
from losa_kernels import gram
from tests.helpers.tiny import tiny_llama

IDS = torch.arange(6 * 16).reshape(6, 16) % 90


class Copies:
    """Counts what goes to the host, by ``.to`` or ``.cpu``, and what is brought together by ``torch.cat``."""

    def __init__(self, monkeypatch):
        self.to_host, self.cats = 0, 0
        to, cpu, cat = torch.Tensor.to, torch.Tensor.cpu, torch.cat

        def counted_to(tensor, *args, **kwargs):
            self.to_host += any(str(place) == "cpu" for place in (*args[:1], kwargs.get("device")))
            return to(tensor, *args, **kwargs)

        def counted_cpu(tensor):
            self.to_host += 1
            return cpu(tensor)

        def counted_cat(tensors, *args, **kwargs):
            self.cats += 1
            return cat(tensors, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", counted_to)
        monkeypatch.setattr(torch.Tensor, "cpu", counted_cpu)
        monkeypatch.setattr(torch, "cat", counted_cat)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Streams of a model on the CPU wait as if on a GPU that has so much memory left."""

    def begin(free):
        monkeypatch.setattr(calibration, "_keeps_streams", lambda device: True)
        monkeypatch.setattr(stream_storage, "free_bytes", lambda device: free)

    return begin


def test_streams_stay_on_the_device_without_a_copy_on_the_host(as_on_a_gpu, monkeypatch):
    model = tiny_llama()
    blocks = find_blocks(model)
    with torch.no_grad():
        expected = BlockStream(model, blocks, IDS, 4)
        as_on_a_gpu(4 * expected.nbytes)
        stream, seen = BlockStream(model, blocks, IDS, 4), []
        memory = {hidden.untyped_storage().data_ptr() for hidden in stream.hidden}
        # The blocks run as ever: what is counted is what is done with their outputs.
        outputs = [[list(expected.run(index)), expected.advance(index)][0] for index in range(len(blocks))]
        monkeypatch.setattr(stream, "run", lambda index: iter(outputs[index]))
        monkeypatch.setattr(calibration, "gram", lambda x, out=None: seen.append(x) or gram(x, out=out))
        with monkeypatch.context() as context:
            copies = Copies(context)
            for index in range(len(blocks)):
                stream.advance(index)
            found = stream.gram()
            assert copies.to_host == copies.cats == 0
        assert len(memory) == 1 and {h.untyped_storage().data_ptr() for h in stream.hidden} == memory
        assert [x.untyped_storage().data_ptr() for x in seen] == [*memory] and seen[0].shape == (6, 16 * 32)
        assert all(map(torch.equal, stream.hidden, expected.hidden)) and stream.nbytes == expected.nbytes
        assert torch.allclose(found, expected.gram(), rtol=1e-5, atol=1e-5 * found.abs().max().item())


def test_streams_that_do_not_fit_wait_in_pinned_memory(as_on_a_gpu, monkeypatch):
    model = tiny_llama()
    blocks = find_blocks(model)
    pinned, empty = [], torch.empty
    monkeypatch.setattr(stream_storage, "SLICE_BYTES", 6 * 37 * 4)
    with torch.no_grad():
        expected = BlockStream(model, blocks, IDS, 4)
        as_on_a_gpu(4 * expected.nbytes - 1)

        def counted(*args, pin_memory=False, **kwargs):
            if pin_memory:
                pinned.append(args[0])
            return empty(*args, **kwargs)

        monkeypatch.setattr(torch, "empty", counted)
        stream = BlockStream(model, blocks, IDS, 4)
        for index in range(len(blocks)):
            stream.advance(index)
            expected.advance(index)
        assert pinned == [(6, 16, 32)], "once, whatever the number of blocks"
        assert all(map(torch.equal, stream.hidden, expected.hidden))
        stream._held._device = torch.device("cpu:0")  # another one than where the states wait
        assert [x.shape for x in stream._held.features()] == 13 * [(6, 37)] + [(6, 31)]
        whole = expected.gram()
        assert torch.allclose(stream.gram(), whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item())


def test_a_system_that_pins_nothing_and_blocks_that_change_the_dtype(monkeypatch):
    def refused(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("no memory to pin")
        return empty(*args, **kwargs)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", refused)
    monkeypatch.setattr(stream_storage, "free_bytes", lambda device: 0)
    held = stream_storage.StreamStorage(torch.device("cpu"), 3)
    first = [held.write(0, torch.ones(2, 4, 5)), held.write(2, torch.ones(1, 4, 5))]
    later = [held.write(0, 2 * first[0].bfloat16()), held.write(2, 3 * first[1].bfloat16())]
    assert all(bool((x == 1).all()) for x in first), "what waits is not written over by another dtype"
    (features,) = held.features()
    assert features.dtype == torch.bfloat16 and features.tolist() == 2 * [20 * [2.0]] + [20 * [3.0]]
    assert later[0].data_ptr() == features.data_ptr()
