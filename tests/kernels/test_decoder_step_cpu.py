"""A decode step's kernels of CPUs: what the tests of all devices do not ask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from losa_kernels import decoder_step
from tests.helpers.decoder_steps import compare

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 63, 64, 65, 1000])
def test_every_number_of_places_and_queries(isa, dtype, count):
    """Sets of four, two and one query; heads that are no whole registers; what is not finite stays so."""
    for group in (1, 2, 3, 4, 7):
        for size in (2, 18, 64):
            q, cache = torch.randn(2 * group, size).to(dtype), torch.randn(2, 2, count + 3, size).to(dtype)
            finished = torch.zeros(2 * group, dtype=torch.int32)
            arguments = q, cache, torch.tensor([count - 1]), count + 1, size**-0.5, finished
            found = compare(decoder_step, "attend_cache", *arguments)
            q[0, 0] = torch.nan
            spoilt = decoder_step.attend_cache(*arguments)
            assert spoilt[0].isnan().all() and torch.equal(spoilt[1:], found[1:])


def test_silu_over_its_whole_range(isa):
    """Within a few roundings of torch's where e^-x is an fp32 number, and 0 or NaN as torch's where it overflows."""
    gate = torch.cat([torch.linspace(-120, 120, 20001), torch.tensor([0.0, -0.0, -1e30, -3e38, torch.inf])])
    found = decoder_step.gated_silu(torch.cat([gate, torch.ones_like(gate)]))
    exact = F.silu(gate.double())
    # From e^88 on the result is 0.
    near = (found - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-35
    assert near[:-1].all() and found[-1] == torch.inf
    for gone in (torch.nan, -torch.inf):
        assert decoder_step.gated_silu(torch.tensor([gone, 1.0])).isnan().all() and F.silu(torch.tensor(gone)).isnan()


def test_what_has_no_weight_does_not_count(isa):
    """However large its value is."""
    q, cache = torch.ones(4, 64), torch.zeros(2, 1, 70, 64)
    cache[0, 0, :69], cache[1, 0, :69] = -100.0, 3e38
    finished = torch.zeros(4, dtype=torch.int32)
    assert not decoder_step.attend_cache(q, cache, torch.tensor([69]), 70, 1.0, finished).any()
