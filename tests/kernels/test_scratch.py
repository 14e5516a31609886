"""Kept memory: one buffer per thread, name and dtype, usable in and out of inference mode."""

from __future__ import annotations

import threading

import torch

from losa_kernels.scratch import scratch


def test_memory_is_kept_and_grows():
    first = scratch("test", (3, 4), torch.float32)
    assert scratch("test", (2, 6), torch.float32).data_ptr() == first.data_ptr()
    assert scratch("test", (2, 2), torch.float32).shape == (2, 2)
    assert scratch("test", (50, 4), torch.float32).data_ptr() != first.data_ptr()
    names = {("test", torch.float32), ("test", torch.float64), ("other", torch.float32)}
    assert len({scratch(name, (5,), dtype).data_ptr() for name, dtype in names}) == 3


def test_threads_do_not_share():
    here, there = scratch("thread", (8,), torch.float32), []
    worker = threading.Thread(target=lambda: there.append(scratch("thread", (8,), torch.float32)))
    worker.start()
    worker.join()
    assert there[0].data_ptr() != here.data_ptr()


def test_memory_is_the_hosts_whatever_the_default_device_is():
    with torch.device("meta"):
        assert scratch("default device", (4,), torch.float32).device.type == "cpu"


def test_memory_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        scratch("inference", (4,), torch.float32)
    x = torch.ones(2, 2, requires_grad=True)
    with torch.no_grad():
        torch.mm(x, x, out=scratch("inference", (2, 2), torch.float32))
