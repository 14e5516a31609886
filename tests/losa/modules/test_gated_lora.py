"""Layers whose components have gates: function, and what becomes of closed ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losa.modules.gated_lora import AdaLoRALinear, SoRALinear
from tests.helpers.layers import IN, OUT, RANK, SCALING, inputs, make

EPS = torch.finfo(torch.float32).eps


def truth(layer, linear, x):
    """By the formula, in fp64."""
    base = x.double() @ torch.where(layer.mask_bool(), linear.weight.double(), 0).T + linear.bias.double()
    A, B, gate = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.gate))
    return base + SCALING * ((x.double() @ A.T) * gate[:, 0]) @ B.T


def close(ours, exact):
    return (ours.double() - exact).abs().max() <= 16 * EPS * exact.abs().max()


@pytest.mark.parametrize("cls", [SoRALinear, AdaLoRALinear])
def test_gates_scale_components(cls):
    layer, linear = make(cls)
    layer.gate.data.copy_(torch.tensor([[0.5], [-2.0], [0.0], [1.0]]))
    x = inputs()
    assert close(layer(x), truth(layer, linear, x))
    layer(x).square().sum().backward()
    assert all(getattr(layer, part).grad.abs().max() > 0 for part in layer.adapter_parts)
    dense = (truth(layer, linear, torch.eye(IN)) - linear.bias.double()).T
    assert close(layer.merge_dense().weight, dense)
    assert close(layer.effective_weight(), torch.where(layer.mask_bool(), dense, 0))


def test_both_begin_as_the_pruned_layer():
    sora = SoRALinear(torch.zeros(OUT, IN), rank=RANK, generator=torch.Generator().manual_seed(0))
    ada = AdaLoRALinear(torch.zeros(OUT, IN), rank=RANK, generator=torch.Generator().manual_seed(0))
    assert not sora.lora_B.any() and 0.1 < float(sora.gate.detach().std()) < 3
    assert not ada.gate.any()
    assert [float(t.detach().std()) for t in (ada.lora_A, ada.lora_B)] == pytest.approx([0.02, 0.02], rel=0.2)
    assert not sora(inputs()).any() and not ada(inputs()).any()
    meta = AdaLoRALinear(torch.zeros(OUT, IN, device="meta"), rank=RANK)
    assert {part: tuple(getattr(meta, part).shape) for part in meta.adapter_parts} == meta.adapter_shapes(RANK)


def test_closed_components_are_dropped():
    layer, linear = make(SoRALinear)
    layer.gate.data.copy_(torch.tensor([[0.5], [0.0], [-2.0], [0.0]]))
    x = inputs()
    exact = truth(layer, linear, x)
    layer.drop_closed()
    assert layer.rank == 2 and layer.gate.flatten().tolist() == [0.5, -2.0]
    assert close(layer(x), exact)
    layer.gate.data.zero_()
    layer.drop_closed()
    assert layer.rank == 1 and not layer.gate.any()


def test_ranks_change_and_states_of_another_rank_come_back():
    layer, linear = make(SoRALinear)
    x = inputs()
    exact = truth(layer, linear, x)
    layer.set_rank(6, torch.Generator().manual_seed(1))
    assert layer.gate.shape == (6, 1) and close(layer(x), exact), "growing keeps the function"
    layer.gate.data[2] = 0
    A, B = (factor.detach() for factor in layer.factors())
    sizes = [float(a.norm() * b.norm()) for a, b in zip(A, B.T, strict=True)]
    kept = sorted(sorted(range(6), key=lambda i: -sizes[i])[:3])
    expected = layer.gate[kept].detach().clone()
    layer.set_rank(3)
    assert torch.equal(layer.gate, expected), "shrinking counts the gate"
    other = SoRALinear.from_linear(nn.Linear(IN, OUT), RANK, scaling=SCALING)
    other.load_state_dict(layer.state_dict())
    assert other.rank == 3 and torch.equal(other(x), layer(x))
