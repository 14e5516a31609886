"""Products with packed weights: problems, and how close a result must be."""

from __future__ import annotations

import torch
from torch.nn.functional import linear


def random_problem(rows, columns, density, dtype=torch.float32, seed=0):
    """(weight with NaN where it is pruned, its kept values with zeros, mask). One row is empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    kept = torch.rand(rows, columns, generator=generator) < density
    kept[rows // 2] = False
    return weight.masked_fill(~kept, float("nan")), weight.masked_fill(~kept, 0), kept


def assert_close(ours, x, weight, bias, few=False):
    """err(ours) <= 2 err(plain torch in this precision) + one rounding, against fp64. Of a few results plain torch may
    have all right by chance: then the rounding is one of their terms' sizes, whatever cancels."""
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert ours.dtype == x.dtype and ours.shape == exact.shape
    if exact.numel():
        largest = linear(x.abs(), weight.abs().to(x.dtype)) if few else exact.abs()
        rounding = torch.finfo(x.dtype).eps * largest.max()
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + rounding
