"""The layer that trains every kept weight: function, gradients and what is read of it, against the formula in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losa.modules.masked_linear import MaskedLinear
from losa.modules.masked_lora import dense_mode

IN, OUT = 43, 24


def make(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    for parameter in linear.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    layer = MaskedLinear.from_linear(linear, 5, scaling=3.0, dropout_p=0.5, mask=kept())
    # Also where nothing is kept, as after a later mask.
    layer.delta.data.copy_(torch.randn(OUT, IN, generator=generator))
    return layer, linear


def kept():
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_and_gradients_are_the_formulas(dtype):
    layer, linear = make(dtype)
    linear.weight.data[~kept()] = torch.nan  # what stands at pruned places reaches nothing
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = layer.train()(x)
    y.backward(grad)

    wide = x.detach().double().requires_grad_()
    delta = layer.delta.detach().double().requires_grad_()
    weight = torch.where(kept(), linear.weight.detach().double() + delta, 0)
    truth = F.linear(wide, weight, linear.bias.detach().double())
    truth.backward(grad.double())
    for ours, exact in ((y, truth), (x.grad, wide.grad), (layer.delta.grad, delta.grad)):
        assert (ours.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert layer.delta.dtype == layer.delta.grad.dtype == torch.float32
    assert not layer.delta.grad[~kept()].any()
    assert layer.weight.grad is None and layer.bias.grad is None


def test_gradients_of_the_layer_are_those_of_autograd():
    layer, _ = make(torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, delta: torch.func.functional_call(layer, {"delta": delta}, x), (x, layer.delta), fast_mode=True
    )


def test_autocast_computes_in_low_precision_and_keeps_the_masters():
    layer, _ = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.ones(3, IN))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.delta.grad.dtype == torch.float32
    assert torch.equal(layer.delta.grad, 3.0 * kept())


def test_merging_keeps_zeros_and_function():
    layer, linear = make()
    dense = linear.weight + layer.delta
    assert torch.equal(layer.dense_weight(), dense)
    merged = layer.merge()
    assert type(merged) is nn.Linear and torch.equal(merged.weight, torch.where(kept(), dense, 0))
    assert not torch.signbit(merged.weight[~kept()]).any()
    x = torch.randn(3, IN)
    assert torch.equal(merged(x), layer(x))
    with dense_mode(layer):
        assert torch.equal(layer(x), linear(x))


def test_there_are_no_ranks_and_states_come_back():
    layer, _ = make()
    assert layer.rank == 0 and layer.dropout_p == 0 and "rank" not in repr(layer)
    for call in (lambda: layer.set_rank(3), layer.factors):
        with pytest.raises(ValueError, match="trains its weights"):
            call()
    fresh = MaskedLinear(torch.zeros(OUT, IN), torch.zeros(OUT))
    assert not fresh.delta.any() and [n for n, p in fresh.named_parameters() if p.requires_grad] == ["delta"]
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(fresh(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
