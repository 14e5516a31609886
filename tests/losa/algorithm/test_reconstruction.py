"""Reconstruction errors, accumulated over batches."""

from __future__ import annotations

import pytest
import torch

from losa.algorithm.reconstruction import ErrorMeter


def test_error_meter():
    torch.manual_seed(0)
    dense, sparse = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
    d, s = dense.flatten(0, 1).double(), sparse.flatten(0, 1).double()
    relative = (((d - s) / d.norm(dim=0)) ** 2).sum() / 16
    frobenius = (d - s).norm()
    for kind, expected in (("relative", relative), ("frobenius", frobenius)):
        meter = ErrorMeter(kind)
        for part in range(4):
            meter.update(dense[part : part + 1], sparse[part : part + 1])
        assert meter.result() == pytest.approx(expected.item(), rel=1e-5)
