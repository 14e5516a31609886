"""Keep counts meet their budget exactly, nest, and move as many weights as the box of rates allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.algorithm.keep_counts import allocate_keep_n


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 48), st.sampled_from([4, 8, 16]), st.floats(0.06, 1.0), st.integers(0, 10**6))
def test_keep_counts_meet_the_budget(count, m, density, seed):
    importance = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = max(1.0, density * m)
    counts = allocate_keep_n(importance, mean, m, delta=0.03)
    assert int(counts.sum()) == int(mean * count + 0.5)
    assert bool(((counts >= 1) & (counts <= m)).all())
    ordered = counts[importance.argsort(descending=True)]
    assert bool((ordered.diff() <= 0).all()), "more important blocks keep more"
    assert int(counts.max() - counts.min()) <= 3


def test_keep_counts_spread_as_much_as_the_rates_box():
    importance = torch.arange(32, dtype=torch.float64)
    counts = allocate_keep_n(importance, 2.0, 8, delta=0.025)
    # 32 x 0.025 x 8 / 2 = 3.2: three blocks up, three down.
    assert counts.tolist() == [1] * 3 + [2] * 26 + [3] * 3
    assert allocate_keep_n(importance, 2.0, 8, delta=0.0).tolist() == [2] * 32


def test_keep_counts_never_grow_under_a_ceiling():
    importance = torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    ceiling = torch.tensor([2, 4, 3, 3])
    counts = allocate_keep_n(importance, 2.0, 4, delta=0.1, ceiling=ceiling)
    assert bool((counts <= ceiling).all()) and int(counts.sum()) == 8
    with pytest.raises(ValueError, match="mean_keep"):
        allocate_keep_n(importance, 3.5, 4, ceiling=ceiling)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.sampled_from([(2.0, 4), (3.0, 8), (2.4, 8), (1.0, 4), (7.5, 8)]),
    st.floats(0, 0.3),
    st.integers(1, 2),
    st.integers(0, 2),
)
def test_keep_counts_are_the_best_that_move_as_many_weights(values, mean_m, delta, lo, room):
    """Against every vector of counts within one step of the even ones and the same total deviation from them."""
    mean, m = mean_m
    importance = torch.tensor(values, dtype=torch.float64)
    lo = min(lo, int(mean))
    hi = min(m, lo + room + int(np.ceil(mean)))
    even = allocate_keep_n(importance, mean, m, 0.0, lo=lo, hi=hi)
    got = allocate_keep_n(importance, mean, m, delta, lo=lo, hi=hi)
    least, most = int(mean) - 1, int(np.ceil(mean)) + 1
    assert int(even.max() - even.min()) <= 1
    allowed = 2 * round(len(values) * delta * m / 2)
    best = -np.inf
    for steps in itertools.product((-1, 0, 1), repeat=len(values)):
        counts = even + torch.tensor(steps)
        inside = bool(((counts >= max(lo, least)) & (counts <= min(hi, most))).all())
        if sum(steps) == 0 and sum(map(abs, steps)) <= allowed and inside:
            best = max(best, float(importance @ counts.double()))
    assert int(got.sum()) == int(even.sum()) and int((got - even).abs().sum()) <= allowed
    assert float(importance @ got.double()) == best


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 32), st.sampled_from([4, 8, 16]), st.floats(0.1, 0.9), st.integers(0, 10**6))
def test_keep_counts_of_successive_rounds_nest(count, m, final, seed):
    """Importance changes from round to round; counts never grow and every budget is met."""
    ceiling = None
    for t in range(1, 6):
        theta = final * (1 - (1 - t / 5) ** 3)
        importance = torch.rand(count, generator=torch.Generator().manual_seed(seed + t)).double()
        mean = max(1.0, m * (1 - theta))
        counts = allocate_keep_n(importance, mean, m, delta=0.03, ceiling=ceiling)
        assert int(counts.sum()) == int(mean * count + 0.5)
        assert bool((counts >= 1).all()) and (ceiling is None or bool((counts <= ceiling).all()))
        ceiling = counts


def test_keep_counts_leave_the_mean_only_where_ceilings_force_them():
    importance = torch.arange(6, 0, -1).double()
    ceiling = torch.tensor([8, 8, 8, 8, 1, 1])
    assert allocate_keep_n(importance, 3.0, 8, delta=0.4, ceiling=ceiling).tolist() == [4, 4, 4, 4, 1, 1]


@pytest.mark.parametrize("keep_n, m", [(1, 20), (2, 40), (3, 60)])
def test_keep_counts_at_the_highest_sparsity(keep_n, m):
    importance = torch.arange(6, dtype=torch.float64)
    assert int(allocate_keep_n(importance, m * (1 - (1 - keep_n / m)), m).sum()) == 6 * keep_n


def test_equally_important_blocks_keep_the_same():
    assert allocate_keep_n(torch.ones(8), 2.0, 4, delta=0.4).tolist() == [2] * 8
    assert allocate_keep_n(torch.ones(4), 2.5, 4, delta=0.0).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"importance": torch.tensor([1.0, float("nan")])}, "importance: expected"),
        ({"importance": torch.ones(2, 2)}, "importance: expected"),
        ({"mean_keep": 0.0}, "mean_keep: expected"),
        ({"mean_keep": 4.5}, "mean_keep: expected"),
        ({"hi": 5}, "lo, hi: expected"),
        ({"lo": 3, "hi": 2}, "lo, hi: expected"),
        ({"lo": 3}, "mean_keep: no counts"),
        ({"ceiling": torch.ones(3)}, "ceiling: expected"),
    ],
)
def test_bad_arguments_of_keep_counts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        allocate_keep_n(**({"importance": torch.ones(2), "mean_keep": 2.0, "m": 4} | change))
