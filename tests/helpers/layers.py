"""Masked-LoRA layers with random masks, their inputs, and the function that they should compute."""

from __future__ import annotations

import torch
from torch import nn

from losa.modules.masked_lora import MaskedLoRALinear

IN, OUT, RANK, SCALING = 43, 24, 4, 2.0


def make(cls=MaskedLoRALinear, *, bias=True, dtype=torch.float32, seed=0, in_features=IN, masked=True, **settings):
    """A layer with a random mask and a trained-looking adapter, and the linear it came from."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, OUT, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    mask = torch.rand(OUT, in_features, generator=generator) < 0.5 if masked else None
    layer = cls.from_linear(linear, RANK, scaling=SCALING, mask=mask, generator=generator, **settings)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return layer, linear


def inputs(rows=5, dtype=torch.float32, in_features=IN):
    return torch.randn(2, rows, in_features, generator=torch.Generator().manual_seed(9)).to(dtype)


def effective(layer, dtype=torch.float64):
    """M * (W + s B A) by the book."""
    dense = layer.weight.to(dtype) + layer.scaling * layer.lora_B.to(dtype) @ layer.lora_A.to(dtype)
    return torch.where(layer.mask_bool(), dense, 0)


def assert_close_to_plain(ours, plain, truth):
    """The error model of one op: at most twice plain PyTorch's error in the same precision, and one rounding."""
    rounding = torch.finfo(ours.dtype).eps * truth.abs().max()
    allowed = 2 * (plain.double() - truth).abs().max() + rounding
    assert (ours.double() - truth).abs().max() <= allowed
