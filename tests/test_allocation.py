"""Budgets are met exactly, bounds hold, and the rates are the linear programme's optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from losa.allocation import (
    allocate_keep_n,
    allocate_ranks,
    cka_importance,
    cka_rates,
    default_delta,
    ranks_by_sparsity,
    uniform_ranks,
)


def similarity(count, seed):
    g = torch.Generator().manual_seed(seed)
    half = torch.rand(count, count, generator=g, dtype=torch.float64)
    matrix = (half + half.T) / 2
    return matrix.fill_diagonal_(1)


@pytest.mark.parametrize(
    "target, delta", [(0.3, 0.01), (0.5, 0.01), (0.6, 0.02), (0.7, 0.03), (0.8, 0.02), (0.95, 0.005)]
)
def test_delta_rule(target, delta):
    assert default_delta(target) == pytest.approx(delta)


def test_delta_keeps_every_rate_below_one_and_lets_rounds_nest():
    targets = np.linspace(0, 0.95, 400)
    upper = [t + default_delta(t) for t in targets]
    assert max(upper) < 1
    assert all(a <= b + 1e-12 for a, b in zip(upper, upper[1:], strict=False)), (
        "a later round's box must hold the earlier's"
    )
    with pytest.raises(ValueError, match="target"):
        default_delta(0.96)


def test_importance_is_the_equation():
    matrix = similarity(5, 0)
    c = torch.tensor([sum(matrix[i, j] for j in range(5) if j != i) for i in range(5)], dtype=torch.float64)
    assert torch.allclose(cka_importance(matrix, beta=3.0), torch.exp(-3.0 * c / c.sum()))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.95), st.one_of(st.none(), st.floats(0, 0.04)), st.integers(0, 10**6))
def test_rates_are_the_optimum(count, target, delta, seed):
    matrix = similarity(count, seed)
    rates = cka_rates(matrix, target, delta)
    width = default_delta(target) if delta is None else delta
    assert rates.mean().item() == pytest.approx(target, abs=1e-12)
    low, high = max(target - width, 0), min(target + width, 0.99)
    assert bool(((rates >= low - 1e-12) & (rates <= high + 1e-12)).all())
    cost = cka_importance(matrix)
    oracle = linprog(
        cost.numpy(), A_eq=np.ones((1, count)), b_eq=[target * count], bounds=[(low, high)] * count, method="highs"
    )
    assert float(cost @ rates) == pytest.approx(oracle.fun, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(0, 10**6))
def test_rates_of_successive_rounds_nest(count, seed):
    floor = None
    for t in range(1, 6):
        target = 0.7 - 0.7 * (1 - t / 5) ** 3
        rates = cka_rates(similarity(count, seed + t), target, floor=floor)
        assert rates.mean().item() == pytest.approx(target, abs=1e-9)
        assert floor is None or bool((rates >= floor - 1e-12).all())
        floor = rates


def test_less_important_blocks_are_sparser():
    matrix = torch.full((4, 4), 0.2, dtype=torch.float64).fill_diagonal_(1)
    matrix[0, 1] = matrix[1, 0] = 0.9
    rates = cka_rates(matrix, 0.5)
    assert min(rates[0], rates[1]) > max(rates[2], rates[3])


def test_impossible_floor_is_refused():
    with pytest.raises(ValueError, match="floor"):
        cka_rates(similarity(4, 0), 0.5, floor=torch.full((4,), 0.6, dtype=torch.float64))


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


def test_impossible_rank_budget_is_refused():
    with pytest.raises(ValueError, match="mean_rank"):
        allocate_ranks(torch.ones(3), 17, 1, 16)


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
