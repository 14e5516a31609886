"""A linear under a mask without an adapter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losa.modules import PrunedLinear, dense_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_masked_weight(dtype):
    linear = nn.Linear(11, 3, dtype=dtype)
    layer = PrunedLinear.from_linear(linear)
    x, kept = torch.randn(2, 5, 11, dtype=dtype), torch.rand(3, 11) < 0.5
    close = partial(torch.testing.assert_close, rtol=16 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    close(layer(x), linear(x))
    layer.set_mask(kept)
    expected = torch.where(kept, linear.weight, torch.zeros_like(linear.weight))
    close(layer(x), F.linear(x, expected, linear.bias))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()), lambda _: None):
        layer(x.requires_grad_())
    assert linear.weight.data_ptr() in saved, "and no product with the mask"
    with dense_mode(layer):
        assert torch.equal(layer(x), linear(x))
    merged = layer.merge()
    assert type(merged) is nn.Linear and torch.equal(merged.weight, expected)
    assert torch.equal(torch.signbit(merged.weight[~kept]), torch.zeros(int((~kept).sum()), dtype=torch.bool))
    assert torch.equal(layer.unwrap().weight, linear.weight) and layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.dense_weight().dtype == torch.float32 and layer.dense_weight().data_ptr() != linear.weight.data_ptr()


def test_it_has_nothing_to_train_and_no_rank():
    layer = PrunedLinear.from_linear(nn.Linear(4, 1))  # narrower than any useful rank
    assert layer.rank == 0 and not any(p.requires_grad for p in layer.parameters())
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "mask"}
    with pytest.raises(ValueError, match="expected no rank of a layer without an adapter, got 2"):
        layer.set_rank(2)
    with pytest.raises(ValueError, match="factors: expected a layer with a low-rank adapter"):
        layer.factors()
