"""What masked LoRA and the dense-adapter baseline have in common, and where the baseline differs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode
from tests.helpers.layers import IN, OUT, RANK, SCALING, assert_close_to_plain, effective, inputs, make


@pytest.mark.parametrize("cls", [MaskedLoRALinear, LoRALinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once_and_zeros_are_positive(dtype, cls):
    layer, _ = make(cls, dtype=dtype)
    merged = layer.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert not any(p.requires_grad for p in merged.parameters())
    assert merged.bias.data_ptr() == layer.bias.data_ptr()
    pruned = ~layer.mask_bool()
    assert pruned.any() and not merged.weight[pruned].any() and not torch.signbit(merged.weight[pruned]).any()
    truth = effective(layer)
    fp32 = torch.finfo(torch.float32).eps * (layer.weight.double().abs() + 2 * SCALING * RANK * 9)
    allowed = torch.finfo(dtype).eps / 2 * truth.abs() + fp32
    assert ((merged.weight.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("cls", [MaskedLoRALinear, LoRALinear])
def test_dense_mode(cls):
    layer, linear = make(cls, masked=False)
    if cls is MaskedLoRALinear:
        layer.set_mask(torch.rand(OUT, IN) < 0.5)
    x, model = inputs(), nn.Sequential(layer)
    normal = model(x)
    with dense_mode(model):
        assert torch.equal(model(x), linear(x))
        with dense_mode(layer):
            pass
        assert torch.equal(model(x), linear(x))
    assert torch.equal(model(x), normal)
    with pytest.raises(KeyError), dense_mode(model):
        raise KeyError
    assert layer.adapter_enabled and not torch.equal(normal, linear(x))


@pytest.mark.parametrize("cls", [MaskedLoRALinear, LoRALinear])
def test_dropout_acts_on_the_adapter_while_training(cls):
    layer, _ = make(cls, dropout_p=0.5)
    x = inputs()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    expected = layer(x)
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(first, layer(x)) and not torch.equal(first, expected)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    with torch.no_grad():
        layer.lora_B.zero_()
    plain = F.linear(x, layer.weight * layer.mask_bool(), layer.bias)
    truth = F.linear(x.double(), layer.weight.double() * layer.mask_bool(), layer.bias.double())
    assert_close_to_plain(layer(x), plain, truth)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("cls", [MaskedLoRALinear, LoRALinear])
def test_copies_are_equal_and_independent(duplicate, cls):
    layer, _ = make(cls)
    twin = duplicate(layer)
    assert type(twin) is cls and torch.equal(twin(inputs()), layer(inputs()))
    assert twin.mask.dtype == torch.uint8 and not twin.mask.requires_grad and twin.lora_A.requires_grad
    before = layer(inputs())
    twin.set_mask(torch.zeros(OUT, IN, dtype=torch.bool))
    twin.set_rank(2)
    assert torch.equal(layer(inputs()), before) and layer.rank == RANK


def test_lora_linear_ignores_the_mask_in_its_adapter():
    layer, linear = make(LoRALinear, masked=False)
    x, before = inputs(), linear.weight.detach().clone()
    layer.set_mask(make()[0].mask)
    assert not layer.weight[~layer.mask_bool()].any() and torch.equal(linear.weight, before)

    def function(dtype):
        weight = linear.weight.to(dtype) * layer.mask_bool() + SCALING * layer.lora_B.to(dtype) @ layer.lora_A.to(dtype)
        return F.linear(x.to(dtype), weight, layer.bias.to(dtype))

    assert_close_to_plain(layer(x), function(torch.float32), function(torch.float64))
    assert_close_to_plain(layer.merge_dense()(x), function(torch.float32), function(torch.float64))
    assert not layer.merge().weight[~layer.mask_bool()].any()
