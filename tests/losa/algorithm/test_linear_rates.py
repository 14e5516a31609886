"""Rates of linears: the count of the block is met, what goes is least, and pruners prune what was decided."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from losa.algorithm.engine import Engine
from losa.algorithm.linear_rates import counts_within, removed_curve
from losa.algorithm.schedule import Round
from losa.errors import RecipeError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners import register
from losa.pruners.base import Pruner
from losa.recipe.reading import parse_recipe
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa_kernels import unpack_mask, wanda_mask
from tests.helpers.tiny import EPS, tiny_llama

IDS = torch.randint(0, 90, (4, 24), generator=torch.Generator().manual_seed(1))


def build(pruner="wanda", **allocation):
    model = tiny_llama(layers=2)
    wrap_model(model, rank=4, scaling=2.0)
    allocation = AllocationConfig(
        **({"mean_rank": 4, "rank_max": 12, "rates": "uniform", "per": "linear"} | allocation)
    )
    calibration = CalibrationConfig(data="unused", samples=4, length=24, cka_samples=4, batch_size=2)
    return model, Engine(model, IDS, PruneConfig(sparsity=0.5, pruner=pruner), allocation, calibration)


def curves_of(seed, widths, floors=None):
    """Convex curves from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, width in enumerate(widths):
        steps = torch.rand(width, generator=generator, dtype=torch.float64).sort().values
        curve = torch.cat([steps.new_zeros(1), steps.cumsum(0) / steps.sum()])
        curve[: (floors or [0] * len(widths))[index]] = float("inf")
        found[f"linear {index}"] = curve
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.9), st.floats(0, 0.4))
@example(1531, 0.875, 0.25)  # linears with few rows are full before the count is met
def test_the_count_is_met_within_the_box(seed, sparsity, delta):
    """As in a Llama: every number of rows is a multiple of the smallest."""
    widths, rows = (24, 24, 24, 24, 64), (16, 8, 8, 48, 16)
    curves = curves_of(seed, widths)
    low, high = max(sparsity - delta, 0), min(sparsity + delta, 0.99)
    counts = counts_within(curves, dict(zip(curves, rows, strict=True)), sparsity, low, high)
    taken = sum(count * row for count, row in zip(counts.values(), rows, strict=True))
    assert taken == sum(int(sparsity * width + 1e-6) * row for width, row in zip(widths, rows, strict=True))
    beyond = 0
    for count, width, row in zip(counts.values(), widths, rows, strict=True):
        assert count >= int(max(sparsity - delta, 0) * width)
        beyond += row * max(0, count - int((sparsity + delta) * width + 1e-6))
    # What one step of the largest linear would have been too much for.
    assert beyond < max(rows)


@pytest.mark.parametrize("seed", range(3))
def test_what_goes_is_least(seed):
    """Against every other way to give linears of as many rows the same count; a linear counts by its size."""
    widths = (8, 8, 16)
    curves = curves_of(seed, widths, floors=[0, 3, 0])
    counts = counts_within(curves, dict.fromkeys(curves, 4), 0.5, 0.25, 0.75)
    choices = (c for c in itertools.product(range(2, 7), range(3, 7), range(4, 13)) if sum(c) == 16)
    cost = {
        c: sum(4 * w * float(curve[k]) for w, curve, k in zip(widths, curves.values(), c, strict=True)) for c in choices
    }
    assert tuple(counts.values()) == min(cost, key=cost.__getitem__)


def test_floors_that_exceed_the_count_stay():
    curves = curves_of(0, (8, 8), floors=[6, 5])
    assert list(counts_within(curves, dict.fromkeys(curves, 4), 0.5, 0.4, 0.6).values()) == [6, 5]


@pytest.mark.parametrize("nested", [False, True])
def test_a_curve_is_what_wanda_removes(nested):
    generator = torch.Generator().manual_seed(0)
    layer = MaskedLoRALinear(torch.randn(10, 20, generator=generator), rank=2, generator=generator)
    layer.lora_B.data = torch.randn(10, 2, generator=generator) / 5
    norms = torch.rand(20, generator=generator) + 0.1
    layer.set_mask(wanda_mask(layer.dense_weight(), norms.flip(0), sparsity=0.25))
    curve = removed_curve(layer, norms, nested)
    dense = (layer.weight.double() + 2 * layer.lora_B.double() @ layer.lora_A.double()).detach()
    squares = (dense * norms.double()).square()
    for count in range(20):
        before = layer.mask.data if nested else None
        kept = unpack_mask(wanda_mask(layer.dense_weight(), norms, sparsity=count / 20, mask=before), 20)
        truth = (squares * ~kept).sum() / squares.sum()
        if nested and count < 5:
            assert curve[count] == float("inf")
        else:
            assert float(curve[count]) == pytest.approx(float(truth), rel=64 * EPS, abs=1e-12)
    assert torch.allclose(curve, removed_curve(layer, torch.diag(norms.square()), nested), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("pruner", ["wanda", "magnitude", "sparsegpt"])
def test_rounds_prune_blocks_to_their_counts(pruner):
    model, engine = build(pruner)
    before = None
    for index, sparsity in enumerate((0.25, 0.5), start=1):
        record = engine.run_round(Round(index, sparsity, 4 + index, 0))
        layers = wrapped_linears(model)
        assert record.sparsity == [sparsity] * 2, "all widths divide by 4"
        assert record.linear_sparsity == {name: layer.sparsity for name, layer in layers.items()}
        assert record.linear_ranks == {name: layer.rank for name, layer in layers.items()}
        assert len(set(record.linear_sparsity.values())) > 2 and len(set(record.linear_ranks.values())) > 2
        # Of 32 columns and more, in whole columns.
        assert all(
            abs(rate - sparsity) <= engine.allocation.linear_delta + 1 / 32 for rate in record.linear_sparsity.values()
        )
        for block, rank in zip(engine.blocks, record.ranks, strict=True):
            sizes = [(layer.in_features + layer.out_features, layer.rank) for layer in block.linears.values()]
            left = sum(size * (rank - own) for size, own in sizes)
            assert 0 <= left < max(size for size, _ in sizes)
        masks = [layer.mask_bool().clone() for layer in layers.values()]
        assert before is None or all(bool((now <= then).all()) for now, then in zip(masks, before, strict=True))
        before = masks


def test_ranks_follow_their_setting():
    for ranks, varied in (("uniform", False), ("sparsity", True)):
        record = build(ranks=ranks)[1].run_round(Round(1, 0.5, 10, 0))
        assert (len(set(record.linear_ranks.values())) > 1) == varied
        first = [name for name in record.linear_ranks if name.startswith("model.layers.0.")]
        # Of linears with one rate, remainders make ranks differ by 1.
        by_rate = sorted(first, key=lambda name: (record.linear_sparsity[name], record.linear_ranks[name]))
        assert [record.linear_ranks[name] for name in by_rate] == sorted(record.linear_ranks[name] for name in first)


def test_what_has_no_rates_of_linears_is_refused(own_names, tmp_path):
    class Whole(Pruner):
        def prune_block(self, weights, statistics, pattern, masks):
            raise AssertionError

    register("whole", Whole)
    with pytest.raises(
        RecipeError, match="allocation.per: linear: expected .* got 'whole', which decides about whole b"
    ):
        build("whole")
    recipe = {
        "model": "m",
        "output": str(tmp_path / "o"),
        "calibration": {"data": "x"},
        "allocation": {"per": "linear"},
    }
    with pytest.raises(RecipeError, match="allocation.per: linear needs prune.sparsity, got prune.pattern '2:4'"):
        parse_recipe(recipe | {"method": "prune_only", "prune": {"pattern": "2:4"}})
