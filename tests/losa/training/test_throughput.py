"""Speeds, and the share of a GPU's peak that training uses."""

from __future__ import annotations

import pytest
import torch

from losa.model.flops import TokenWork
from losa.training import throughput
from losa.training.throughput import Throughput, peak_flops
from tests.helpers.tiny import tiny_llama, wrap

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_the_devices_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if teraflops is None else teraflops * 1e12
    assert peak_flops(GPU, torch.bfloat16) == peak_flops(GPU, torch.float16) == expected
    assert peak_flops(GPU, torch.float32) is None and peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_measures():
    assert Throughput(devices=4).measures(1000, 0.5) == {"tokens_per_s": 2000, "tokens_per_s_per_device": 500}
    found = Throughput(devices=4, flops_a_token=6e9, peak=1e13).measures(1000, 0.5)
    assert found["mfu"] == pytest.approx(500 * 6e9 / 1e13)


def test_of_a_model(monkeypatch):
    model = tiny_llama(layers=2)
    wrap(model, targets=["q_proj", "up_proj"])
    # Of each block: q, o 32 x 32; k, v 16 x 32; gate, up, down 64 x 32.
    work = TokenWork(linears=2 * 9216, adapted=2 * 3072, head=98 * 32, attention=2 * 32)
    assert TokenWork.of(model) == work
    assert work.forward(10) == 2 * 18432 + 2 * 10 * 64
    assert work.training(10) == 6 * 6144 + 4 * (18432 - 6144) + 4 * 3136 + 3 * 2 * 10 * 64
    assert Throughput.of(model, 10, torch.device("cpu"), None) == Throughput()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(throughput, "process_count", lambda: 2)
    assert Throughput.of(model, 10, GPU, torch.bfloat16) == Throughput(2, work.training(10), 756e12)
    assert Throughput.of(model.bfloat16(), 10, GPU, None).peak == 756e12
    assert Throughput.of(model.float(), 10, GPU, None).peak is None
