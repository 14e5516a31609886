"""Budgets are met exactly, bounds hold, and the rates are the linear programme's optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from losa.algorithm.importance import cka_importance
from losa.algorithm.keep_counts import allocate_keep_n
from losa.algorithm.ranks import allocate_ranks, ranks_by_sparsity, uniform_ranks
from losa.algorithm.rates import cka_rates, default_delta, uniform_rates


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
    # Targets are computed (1 - keep_n / m), so the last bit must not matter.
    assert default_delta(np.nextafter(0.95, 1)) == pytest.approx(0.005)
    assert default_delta(np.nextafter(0.5, 1)) == 0.01
    for outside in (0.96, -0.01, float("nan")):
        with pytest.raises(ValueError, match="target"):
            default_delta(outside)


def test_importance_is_the_equation():
    matrix = similarity(5, 0)
    c = torch.tensor([sum(matrix[i, j] for j in range(5) if j != i) for i in range(5)], dtype=torch.float64)
    assert torch.allclose(cka_importance(matrix, beta=3.0), torch.exp(-3.0 * c / c.sum()))


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(3, 4), torch.ones(0, 0), torch.full((2, 2), float("nan"))])
def test_bad_similarity_is_refused(bad):
    with pytest.raises(ValueError, match="similarity"):
        cka_importance(bad)


def test_blocks_without_redundancy_are_equally_important():
    assert cka_importance(torch.eye(4)).tolist() == [1, 1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.1, 100), st.integers(0, 10**6))
def test_beta_never_changes_the_order_of_importance(count, beta, seed):
    matrix = similarity(count, seed)
    assert torch.equal(cka_importance(matrix, beta).argsort(), cka_importance(matrix).argsort())


# HiGHS meets bounds to 1e-7 only, so that it is no oracle for boxes of that width.
DELTAS = st.one_of(st.none(), st.just(0.0), st.floats(1e-3, 0.04))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.95), DELTAS, st.integers(0, 10**6))
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


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 30), st.floats(0.1, 0.9), st.floats(0.005, 0.05), st.integers(0, 10**6))
def test_rates_above_floors_are_the_optimum(count, target, delta, seed):
    """HiGHS solves the same programme, with floors on both sides of the box."""
    matrix = similarity(count, seed)
    floor = target + delta * (4 * torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() - 3)
    floor = floor.clamp(0, 1)
    low = floor.clamp_min(max(target - delta, 0))
    high = low.clamp_min(min(target + delta, 0.99))
    oracle = linprog(
        cka_importance(matrix).numpy(),
        A_eq=np.ones((1, count)),
        b_eq=[target * count],
        bounds=list(zip(low.tolist(), high.tolist(), strict=True)),
        method="highs",
    )
    if not oracle.success:
        assert low.mean() > target
        return
    rates = cka_rates(matrix, target, delta, floor)
    assert rates.mean().item() == pytest.approx(target, abs=1e-12)
    assert bool(((rates >= low) & (rates <= high + 1e-12)).all())
    assert float(cka_importance(matrix) @ rates) == pytest.approx(oracle.fun, rel=1e-9)


def test_equal_importance_is_settled_by_position():
    rates = cka_rates(torch.ones(4, 4), 0.5, 0.02)
    assert torch.allclose(rates, torch.tensor([0.52, 0.52, 0.48, 0.48], dtype=torch.float64), rtol=0, atol=1e-12)


def test_small_overshoot_of_the_floors_is_kept():
    floor = torch.tensor([0.5005, 0.5, 0.5, 0.5002], dtype=torch.float64)
    assert torch.equal(cka_rates(similarity(4, 0), 0.5, 0.0, floor), floor)


def test_uniform_rates():
    rates = uniform_rates(3, 0.4)
    assert rates.dtype == torch.float64 and rates.tolist() == [0.4] * 3


def test_no_rate_exceeds_the_cap():
    rates = cka_rates(similarity(6, 0), 0.98, 0.05)
    assert rates.max().item() == pytest.approx(0.99, abs=1e-12) and rates.mean().item() == pytest.approx(0.98)


def test_less_important_blocks_are_sparser():
    matrix = torch.full((4, 4), 0.2, dtype=torch.float64).fill_diagonal_(1)
    matrix[0, 1] = matrix[1, 0] = 0.9
    rates = cka_rates(matrix, 0.5)
    assert min(rates[0], rates[1]) > max(rates[2], rates[3])


def test_impossible_floor_is_refused():
    with pytest.raises(ValueError, match="floor: no rates with mean 0.5000"):
        cka_rates(similarity(4, 0), 0.5, floor=torch.full((4,), 0.6, dtype=torch.float64))


@pytest.mark.parametrize(
    "target, settings, message",
    [
        (0.995, {"delta": 0.001}, "target: expected"),
        (-0.1, {"delta": 0.01}, "target: expected"),
        (0.97, {}, "target: expected"),
        (0.5, {"delta": -0.1}, "delta: expected"),
        (0.5, {"floor": torch.zeros(3)}, "floor: expected"),
        (0.5, {"floor": torch.full((4,), float("nan"))}, "floor: expected rates"),
        (0.5, {"floor": torch.full((4,), -0.1)}, "floor: expected rates"),
    ],
)
def test_bad_arguments_of_rates_are_named(target, settings, message):
    with pytest.raises(ValueError, match=message):
        cka_rates(similarity(4, 0), target, **settings)


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
