"""Speeds, and the share of a GPU's peak that training uses."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from losa.model.flops import TokenWork
from losa.model.wrapping import unwrap_model
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.training import throughput
from losa.training.throughput import Throughput, peak_flops
from tests.helpers.families import family
from tests.helpers.tiny import tiny_llama, wrap
from tests.helpers.training import Experts

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
    work = TokenWork(linears=2 * 9216, masked=2 * 3072, head=98 * 32, attention=2 * 32)
    assert TokenWork.of(model) == work
    assert work.forward(10) == 2 * 18432 + 2 * 10 * 64
    assert work.training(10) == 6 * 6144 + 4 * (18432 - 6144) + 4 * 3136 + 3 * 2 * 10 * 64
    assert Throughput.of(model, 10, torch.device("cpu"), None) == Throughput()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(throughput, "process_count", lambda: 2)
    assert Throughput.of(model, 10, GPU, torch.bfloat16) == Throughput(2, work.training(10), 756e12)
    assert Throughput.of(model.bfloat16(), 10, GPU, None).peak == 756e12
    assert Throughput.of(model.float(), 10, GPU, None).peak is None


@pytest.mark.parametrize(("layer", "dropout_p"), [(MaskedLoRALinear, 0.0), (MaskedLoRALinear, 0.1), (LoRALinear, 0.1)])
def test_a_tokens_products_are_those_that_a_layer_computes(monkeypatch, layer, dropout_p):
    """The input needs a gradient, as that of a layer among others. Twice as many tokens: what is formed once does not
    count."""
    monkeypatch.setenv("LOSA_BACKEND", "reference")
    wrapped = layer(torch.randn(24, 16), rank=2, dropout_p=dropout_p).train()
    counted = []
    for tokens in (64, 128):
        with FlopCounterMode(display=False) as counter:
            wrapped(torch.randn(tokens, 16, requires_grad=True)).sum().backward()
        counted.append(counter.get_total_flops())
    masked = 24 * 16 if layer is MaskedLoRALinear else 0
    work = TokenWork(24 * 16, masked, head=0, attention=0, dropout=dropout_p > 0)
    # A dense adapter's own products, of both of its sides.
    adapter = 0 if masked else 6 * 2 * (24 + 16)
    assert (counted[1] - counted[0]) / 64 == work.training(1) + adapter


def test_a_token_meets_some_of_the_experts():
    model = tiny_llama(layers=2)
    model.config.num_experts_per_tok = 1
    for block in model.model.layers:
        block.mlp = Experts(block.mlp, 32)
    wrap(model)
    # Of four experts, each with gate, up and down 64 x 32, a token meets one; the router is no linear that counts.
    work = TokenWork.of(model)
    assert work.linears == work.masked == 2 * 9216 and work.routed
    del model.config.num_experts_per_tok
    assert TokenWork.of(model).linears == 2 * (9216 + 3 * 3 * 64 * 32) and not TokenWork.of(model).routed


def test_experts_count_by_the_tokens_that_they_get():
    """As a stack, and as linears with adapters, of which some have none."""
    model = family("Qwen3Moe")
    dense = TokenWork.with_adapters(model, (), False)
    attention = sum(layer.weight.numel() for layer in wrap(model, targets="re:self_attn").values())
    # Two of five experts in each of two blocks: gate and up 16 x 32, down 32 x 16.
    experts = 2 * 2 * 3 * 16 * 32
    work = TokenWork.of(model)
    assert work.masked == attention and work.linears == pytest.approx(attention + experts) and work.routed
    assert dense.linears == work.linears
    wrap(unwrap_model(model))
    assert TokenWork.of(model).masked == pytest.approx(attention + experts) == TokenWork.of(model).linears
