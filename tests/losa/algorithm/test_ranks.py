"""Ranks meet their budget and bounds exactly, and follow the errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.algorithm.ranks import allocate_ranks, ranks_by_sparsity, uniform_ranks

errors = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=48)


@settings(max_examples=200, deadline=None)
@given(errors, st.integers(1, 16))
def test_ranks_meet_budget_bounds_and_order(values, mean):
    tensor = torch.tensor(values, dtype=torch.float64)
    ranks = allocate_ranks(tensor, mean, 1, 16)
    assert int(ranks.sum()) == mean * len(values)
    assert bool(((ranks >= 1) & (ranks <= 16)).all())
    order = tensor.argsort()
    ordered = ranks[order]
    distinct = tensor[order].diff() > 0
    assert bool((ordered.diff()[distinct] >= 0).all()), "a larger error never gets a smaller rank"


def clipped_shares(values, budget, low, high):
    """The oracle of Eq. 7 with bounds: bisection on the factor in plain Python, zero errors last."""
    weights = [max(v / max(values), 1e-12) for v in values] if max(values) > 0 else [1.0] * len(values)
    below, above = 0.0, high * 2e12
    for _ in range(300):
        middle = (below + above) / 2
        if sum(min(max(middle * w, low), high) for w in weights) < budget:
            below = middle
        else:
            above = middle
    return [min(max(above * w, low), high) for w in weights]


@settings(max_examples=100, deadline=None)
@given(errors, st.integers(1, 8), st.integers(0, 6), st.integers(0, 20))
def test_ranks_round_the_clipped_shares(values, r_min, above_min, room):
    mean, r_max = r_min + above_min, r_min + above_min + room
    ranks = allocate_ranks(torch.tensor(values, dtype=torch.float64), mean, r_min, r_max)
    assert int(ranks.sum()) == mean * len(values)
    shares = clipped_shares(values, mean * len(values), r_min, r_max)
    assert all(abs(r - s) < 1 + 1e-6 for r, s in zip(ranks.tolist(), shares, strict=True))
    equal = [ranks[[i for i, v in enumerate(values) if v == value]] for value in set(values)]
    assert all(int(same.max() - same.min()) <= 1 for same in equal)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6, allow_subnormal=False), st.integers(1, 400)), min_size=1, max_size=48))
def test_ranks_of_different_sizes_meet_the_parameters(given_):
    values, sizes = map(list, zip(*given_, strict=True))
    ranks = allocate_ranks(torch.tensor(values, dtype=torch.float64), 6, 1, 16, sizes)
    left = 6 * sum(sizes) - sum(size * rank for size, rank in zip(sizes, ranks.tolist(), strict=True))
    assert 0 <= left < max(sizes)
    assert bool(((ranks >= 1) & (ranks <= 16)).all())
    ordered = ranks[torch.tensor(values).argsort()]
    distinct = torch.tensor(values).sort().values.diff() > 0
    assert bool((ordered.diff()[distinct] >= 0).all()), "a larger error never gets a smaller rank"


def test_a_block_of_experts_pays_for_its_ranks():
    # 6 (10 + 90) = 600 parameters; shares in proportion 2 : 1 that cost 10 and 90 a rank: 600 / 110 = 5.45.
    assert allocate_ranks(torch.tensor([2.0, 1.0]), 6, 1, 16, [10, 90]).tolist() == [11, 5]
    assert allocate_ranks(torch.tensor([1.0, 2.0]), 6, 1, 16, [10, 90]).tolist() == [3, 6]
    alike = torch.tensor([3.0, 1.0, 4.0, 1.5])
    assert allocate_ranks(alike, 6, 1, 16, [640] * 4).tolist() == allocate_ranks(alike, 6, 1, 16).tolist()


@pytest.mark.parametrize("sizes", [[1], [1, 0]])
def test_sizes_are_of_every_error(sizes):
    with pytest.raises(ValueError, match="sizes: expected 2 whole numbers >= 1, got"):
        allocate_ranks(torch.ones(2), 4, 1, 16, sizes)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_ranks_do_not_depend_on_the_scale_of_errors(scale):
    assert allocate_ranks(torch.tensor([1.0, 2.0, 3.0, 0.5]).double() * scale, 6, 1, 16).tolist() == [4, 7, 11, 2]


def test_zero_errors_take_what_the_others_cannot():
    # 4 x 6 = 24: the one block with an error stops at 10, three blocks share 14.
    assert allocate_ranks(torch.tensor([0.0, 1.0, 0.0, 0.0]), 6, 1, 10).tolist() == [5, 10, 5, 4]


def test_ranks_are_proportional_where_nothing_is_clipped():
    assert allocate_ranks(torch.tensor([1.0, 2.0, 3.0]), 8, 1, 16).tolist() == [4, 8, 12]
    assert allocate_ranks(torch.zeros(3), 5, 1, 16).tolist() == [5, 5, 5]
    assert allocate_ranks(torch.tensor([0.0, 0.0, 1.0]), 6, 1, 16).tolist() == [1, 1, 16]
    assert ranks_by_sparsity(torch.tensor([0.5, 0.5, 0.5]), 6, 1, 16).tolist() == [6, 6, 6]
    assert uniform_ranks(3, 4).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, float("nan")]), torch.tensor([-1.0, 1.0]), torch.zeros(2, 2), torch.zeros(0)]
)
def test_bad_errors_are_refused(bad):
    with pytest.raises(ValueError, match="errors"):
        allocate_ranks(bad, 4, 1, 16)


@pytest.mark.parametrize("mean, r_min, r_max", [(17, 1, 16), (2, 3, 16), (4, 0, 16), (4, 5, 3)])
def test_impossible_rank_budget_is_refused(mean, r_min, r_max):
    with pytest.raises(ValueError, match="mean_rank"):
        allocate_ranks(torch.ones(3), mean, r_min, r_max)
