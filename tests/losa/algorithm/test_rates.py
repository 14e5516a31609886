"""Rates meet their budget exactly, keep to bounds and floors, and are the linear programme's optimum."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from losa.algorithm.importance import cka_importance
from losa.algorithm.rates import MAX_RATE, default_delta, rates_for, smooth_rates, uniform_rates
from tests.helpers.similarity import similarity


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


# HiGHS meets bounds to 1e-7 only, so that it is no oracle for boxes of that width.
DELTAS = st.one_of(st.none(), st.just(0.0), st.floats(1e-3, 0.04))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.95), DELTAS, st.integers(0, 10**6))
def test_rates_are_the_optimum(count, target, delta, seed):
    matrix = similarity(count, seed)
    rates = rates_for(cka_importance(matrix), target, delta)
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
        rates = rates_for(cka_importance(similarity(count, seed + t)), target, floor=floor)
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
    rates = rates_for(cka_importance(matrix), target, delta, floor)
    assert rates.mean().item() == pytest.approx(target, abs=1e-12)
    assert bool(((rates >= low) & (rates <= high + 1e-12)).all())
    assert float(cka_importance(matrix) @ rates) == pytest.approx(oracle.fun, rel=1e-9)


def test_equal_importance_is_settled_by_position():
    rates = rates_for(torch.ones(4), 0.5, 0.02)
    assert torch.allclose(rates, torch.tensor([0.52, 0.52, 0.48, 0.48], dtype=torch.float64), rtol=0, atol=1e-12)


def test_small_overshoot_of_the_floors_is_kept():
    floor = torch.tensor([0.5005, 0.5, 0.5, 0.5002], dtype=torch.float64)
    assert torch.equal(rates_for(cka_importance(similarity(4, 0)), 0.5, 0.0, floor), floor)


def test_uniform_rates():
    rates = uniform_rates(3, 0.4)
    assert rates.dtype == torch.float64 and rates.tolist() == [0.4] * 3


def test_no_rate_exceeds_the_cap():
    rates = rates_for(cka_importance(similarity(6, 0)), 0.98, 0.05)
    assert rates.max().item() == pytest.approx(0.99, abs=1e-12) and rates.mean().item() == pytest.approx(0.98)


def test_less_important_blocks_are_sparser():
    matrix = torch.full((4, 4), 0.2, dtype=torch.float64).fill_diagonal_(1)
    matrix[0, 1] = matrix[1, 0] = 0.9
    rates = rates_for(cka_importance(matrix), 0.5)
    assert min(rates[0], rates[1]) > max(rates[2], rates[3])


def test_impossible_floor_is_refused():
    with pytest.raises(ValueError, match="floor: no rates with mean 0.5000"):
        rates_for(cka_importance(similarity(4, 0)), 0.5, floor=torch.full((4,), 0.6, dtype=torch.float64))


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
        rates_for(cka_importance(similarity(4, 0)), target, **settings)


IMPORTANCES = st.lists(st.floats(-5, 5), min_size=2, max_size=30).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(IMPORTANCES, st.floats(0.02, 0.95), st.floats(0, 0.45))
def test_smooth_rates_meet_their_mean_within_bounds_in_order_of_importance(importance, target, delta):
    rates = smooth_rates(importance, target, delta)
    assert rates.mean().item() == pytest.approx(target, abs=1e-12)
    assert rates.min() >= -1e-12 and rates.max() <= MAX_RATE + 1e-12
    assert rates.max() - rates.min() <= 2 * delta + 1e-12
    order = importance.argsort()
    assert bool((rates[order].diff() <= 1e-12).all())


@settings(max_examples=100, deadline=None)
@given(IMPORTANCES, st.floats(0.05, 0.9), st.floats(0, 0.3), st.integers(0, 10**6))
def test_smooth_rates_above_floors(importance, target, delta, seed):
    generator = torch.Generator().manual_seed(seed)
    floor = (target * 2 * torch.rand(len(importance), generator=generator)).double().clamp(max=1)
    if floor.mean() > target:
        with (
            pytest.raises(ValueError, match="floor: no rates with mean")
            if floor.mean() > target + 1e-3
            else nullcontext()
        ):
            smooth_rates(importance, target, delta, floor)
        return
    rates = smooth_rates(importance, target, delta, floor)
    assert rates.mean().item() == pytest.approx(target, abs=1e-12) and bool((rates >= floor - 1e-12).all())


def test_densities_of_owl_and_dlp():
    """(1 - s) + 2 lambda z_l minus the mean of the second term, with the importances z brought to [0, 1]."""
    outliers = torch.tensor([0.011, 0.004, 0.02, 0.008], dtype=torch.float64).numpy()
    z = (outliers - outliers.min()) / (outliers.max() - outliers.min())
    density = 2 * 0.08 * z - np.mean(2 * 0.08 * z) + (1 - 0.7)
    assert np.allclose(smooth_rates(torch.tensor(outliers), 0.7, 0.08), 1 - density, rtol=0, atol=1e-15)
    # Equal importances, and no width at all: one rate for all.
    for importance, delta in ((torch.ones(4), 0.1), (torch.tensor(outliers), 0.0)):
        assert smooth_rates(importance, 0.7, delta).tolist() == [0.7] * 4


def test_an_arithmetic_progression():
    """s + beta (l - (L - 1) / 2), beta the width over half of the blocks' steps."""
    rates = smooth_rates(-torch.arange(5, dtype=torch.float64), 0.6, 0.2)
    assert torch.allclose(rates, torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8], dtype=torch.float64), rtol=0, atol=1e-12)


def test_cut_rates_keep_their_mean():
    """0.99 is reached, and every other rate rises by the same amount."""
    rates = smooth_rates(torch.tensor([0.0, 1.0, 2.0]), 0.9, 0.15)
    assert rates[0] == MAX_RATE and rates.mean().item() == pytest.approx(0.9, abs=1e-12)
    assert (rates[1] - rates[2]).item() == pytest.approx(0.15)
