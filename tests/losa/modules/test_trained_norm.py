"""A trained norm computes what it merges to, and is the given norm in dense mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from losa.modules import TrainedNorm, dense_mode
from losa.modules.masked_lora import plain_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_it_is_its_merged_norm(kind, dtype):
    given = kind(12).to(dtype)
    values = [p.detach().clone() for p in given.parameters()]
    layer = TrainedNorm(given)
    trained = dict(layer.named_parameters(recurse=False))
    assert trained.keys() == {f"trained_{name}" for name, _ in given.named_parameters()}
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(layer(x), given(x))
    layer(x).float().square().sum().backward()
    for parameter in trained.values():
        assert parameter.dtype == torch.float32 and parameter.grad.abs().max() > 0
        # Less than bfloat16 resolves near 1: it must not be lost.
        parameter.data += 1e-3 * torch.arange(12)
    merged = layer.merge()
    assert (
        type(merged) is kind and merged.weight.dtype == dtype and not any(p.requires_grad for p in merged.parameters())
    )
    assert torch.equal(merged(x), layer(x)) and not torch.equal(layer(x), given(x))
    with dense_mode(layer):
        assert torch.equal(layer(x), given(x))
    with plain_linears(layer):
        assert torch.equal(layer(x), merged(x))
    assert layer.unwrap() is given and all(map(torch.equal, values, given.parameters()))
