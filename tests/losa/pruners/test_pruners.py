"""The pruners behind their protocol: exact counts, nesting, failure policy, a pruner of one's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa import pruners
from losa.algorithm.engine import Engine
from losa.algorithm.schedule import RoundPlan
from losa.errors import NumericsError, RecipeError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.pruners import Pattern, Pruned, Pruner, get_pruner, register
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa_kernels import pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.pruning import inverse_factor
from tests.helpers.tiny import tiny_llama

NAMES = ["magnitude", "wanda", "sparsegpt"]


@pytest.fixture
def registry(monkeypatch):
    """Names registered by a test are gone after it."""
    monkeypatch.setattr(pruners, "_REGISTRY", dict(pruners._REGISTRY))


def statistic_for(pruner, columns, seed=0):
    x = torch.randn(3 * columns, columns, generator=torch.Generator().manual_seed(seed))
    return {"none": None, "input_norms": x.norm(dim=0), "hessian": x.T @ x}[pruner.statistic]


@pytest.mark.parametrize("name", NAMES)
def test_protocol_and_nesting(name):
    pruner = get_pruner(PruneConfig(pruner=name, sparsity=0.5))
    assert isinstance(pruner, Pruner)
    weight = torch.randn(16, 32)
    statistic = statistic_for(pruner, 32)
    early = pruner.prune(weight, statistic, Pattern(sparsity=0.25), None)
    base = weight if early.weight is None else early.weight
    late = pruner.prune(base, statistic, Pattern(sparsity=0.5), early.mask)
    early_kept, late_kept = unpack_mask(early.mask, 32), unpack_mask(late.mask, 32)
    assert int(early_kept.sum()) == 384 and int(late_kept.sum()) == 256
    assert not bool((late_kept & ~early_kept).any())
    assert (late.weight is not None) == pruner.updates_weight
    for keep_n, m in ((2, 4), (3, 8)):
        kept = unpack_mask(pruner.prune(weight, statistic, Pattern(keep_n=keep_n, m=m), None).mask, 32)
        assert bool((kept.reshape(-1, m).sum(1) == keep_n).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 30), st.floats(0, 0.95), st.integers(0, 99))
def test_magnitude_is_one_threshold_over_the_matrix(rows, columns, sparsity, seed):
    weight = torch.randint(-5, 6, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    pruned = get_pruner(PruneConfig(pruner="magnitude", sparsity=0.5)).prune(
        weight, None, Pattern(sparsity=sparsity), None
    )
    count = int(sparsity * rows * columns + 1e-6)
    order = weight.abs().flatten().argsort(dim=0, stable=True)
    expected = torch.ones(rows * columns, dtype=torch.bool)
    expected[order[:count]] = False
    assert torch.equal(unpack_mask(pruned.mask, columns).flatten(), expected)


def test_magnitude_in_deterministic_mode(device, poisoned_native_memory):
    """Where torch's own kthvalue on CUDA refuses to run."""
    weight = torch.tensor([[3.0, -1.0, 2.0], [1.0, -0.0, 5.0]], device=device)
    magnitude = get_pruner(PruneConfig(pruner="magnitude", sparsity=0.5))
    pruned = magnitude.prune(weight, None, Pattern(sparsity=1 / 3), None)
    expected = torch.tensor([[True, False, True], [True, False, True]])
    assert torch.equal(unpack_mask(pruned.mask, 3).cpu(), expected)


def expected_nested(scores, gone, count):
    """Per row: ``gone`` first, then the smallest scores, ties lowest column first, until ``count``."""
    kept = ~gone
    for row in range(len(scores)):
        left = [c for c in range(scores.shape[1]) if kept[row, c]]
        room = max(count - int(gone[row].sum()), 0)
        for column in sorted(left, key=lambda c: (float(scores[row, c]), c))[:room]:
            kept[row, column] = False
    return kept


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.floats(0, 0.95), st.floats(0, 1), st.integers(0, 99))
def test_nested_masks_count_what_is_gone(rows, columns, sparsity, density, seed):
    """Small integers make ties the rule; earlier masks may be sparser than asked, or empty."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows, columns), generator=generator).float()
    norms = torch.randint(0, 3, (columns,), generator=generator).float()
    gone = torch.rand(rows, columns, generator=generator) < density
    pattern, mask = Pattern(sparsity=sparsity), pack_mask(~gone)
    before = weight.clone()
    wanda = get_pruner(PruneConfig(pruner="wanda", sparsity=0.5)).prune(weight, norms, pattern, mask)
    expected = expected_nested(weight.abs() * norms, gone, int(sparsity * columns + 1e-6))
    assert torch.equal(unpack_mask(wanda.mask, columns), expected)
    magnitude = get_pruner(PruneConfig(pruner="magnitude", sparsity=0.5)).prune(weight, None, pattern, mask)
    flat = expected_nested(weight.abs().reshape(1, -1), gone.reshape(1, -1), int(sparsity * rows * columns + 1e-6))
    assert torch.equal(unpack_mask(magnitude.mask, columns), flat.reshape(rows, columns))
    assert torch.equal(weight, before)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([(2, 4), (1, 4), (3, 8)]), st.integers(0, 99))
def test_nested_groups_of_magnitude(rows, groups, keep_n_m, seed):
    keep_n, m = keep_n_m
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows, groups * m), generator=generator).float()
    gone = torch.rand(rows, groups * m, generator=generator) < 0.5
    pruner = get_pruner(PruneConfig(pruner="magnitude", pattern=f"{keep_n}:{m}"))
    mask = pruner.prune(weight, None, Pattern(keep_n=keep_n, m=m), pack_mask(~gone)).mask
    expected = expected_nested(weight.abs().reshape(-1, m), gone.reshape(-1, m), m - keep_n)
    assert torch.equal(unpack_mask(mask, groups * m), expected.reshape(rows, -1))


@pytest.mark.parametrize("sparsity, size, gone", [(0.7, 10, 7), (0.29, 100, 29), (0.0, 10, 0), (1 / 3, 10, 3)])
def test_counts_are_exact_where_floats_are_not(sparsity, size, gone):
    weight = torch.randn(1, size)
    for name in ("magnitude", "wanda"):
        pruner = get_pruner(PruneConfig(pruner=name, sparsity=0.5))
        mask = pruner.prune(weight, statistic_for(pruner, size), Pattern(sparsity=sparsity), None).mask
        assert int(unpack_mask(mask, size).sum()) == size - gone, name


def test_sparsegpt_is_the_kernel_with_the_recipes_settings():
    weight, x = torch.randn(8, 32), torch.randn(64, 32)
    hessian, mask = x.T @ x, pack_mask(torch.rand(8, 32) < 0.9)
    config = PruneConfig(pruner="sparsegpt", sparsity=0.5, damping=0.2, block_size=8)
    result = get_pruner(config).prune(weight, hessian, Pattern(sparsity=0.5), mask)
    expected = sparsegpt_prune(weight, hessian, sparsity=0.5, damping=0.2, block_size=8, mask=mask)
    assert torch.equal(result.weight, expected.weight) and torch.equal(result.mask, expected.mask)
    assert result.damping == 0.2 and result.loss == pytest.approx(float(expected.loss.sum()))
    for other in ({"damping": 0.01, "block_size": 8}, {"damping": 0.2, "block_size": 32}):
        changed = sparsegpt_prune(weight, hessian, sparsity=0.5, mask=mask, **other)
        assert not torch.equal(result.weight, changed.weight), "each setting matters"


def test_sparsegpt_refuses_blocks_that_split_groups():
    with pytest.raises(RecipeError, match="prune.block_size: expected a multiple of 6 for the pattern '2:6', got 128"):
        get_pruner(PruneConfig(pruner="sparsegpt", pattern="2:6"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [Pattern(sparsity=0.5), Pattern(keep_n=2, m=4)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(name, pattern, bad):
    pruner = get_pruner(PruneConfig(pruner=name, sparsity=0.5))
    weight = torch.randn(4, 8)
    weight[1, 3] = bad
    with pytest.raises(NumericsError, match="weight: expected finite"):
        pruner.prune(weight, statistic_for(pruner, 8), pattern, None)


def test_fallback_is_wanda_on_the_hessians_diagonal():
    weight, norms = torch.randn(6, 16), torch.randint(1, 9, (16,)) / 4  # exact squares
    # Off-diagonal entries far above Cauchy-Schwarz: indefinite however much of the diagonal is added.
    hessian = torch.full((16, 16), -100.0).fill_diagonal_(0) + torch.diag(norms.square())
    mask = pack_mask(torch.rand(6, 16) < 0.8)
    pruner = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5, on_singular="wanda"))
    for pattern in (Pattern(sparsity=0.5), Pattern(keep_n=2, m=4)):
        result = pruner.prune(weight, hessian, pattern, mask)
        assert torch.equal(result.mask, wanda_mask(weight, norms, mask=mask, **pattern.as_kwargs()))
        assert result.weight is None and result.damping == float("inf")


def test_singular_hessian_policy():
    weight, bad = torch.randn(4, 8), -torch.eye(8)
    with pytest.raises(NumericsError, match="on_singular"):
        get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5)).prune(weight, bad, Pattern(sparsity=0.5), None)
    lenient = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5, on_singular="wanda"))
    result = lenient.prune(weight, bad, Pattern(sparsity=0.5), None)
    assert result.weight is None and result.damping == float("inf")
    assert int(unpack_mask(result.mask, 8).sum()) == 16


def test_own_pruner(registry):
    class EveryOther:
        statistic = "none"
        updates_weight = False

        def __init__(self, config):
            self.config = config

        def prune(self, weight, statistic, pattern, mask):
            kept = torch.zeros_like(weight, dtype=torch.bool)
            kept[:, ::2] = True
            return Pruned(pack_mask(kept))

    register("every-other", EveryOther)
    pruner = get_pruner(PruneConfig(pruner="every-other", sparsity=0.5))
    assert int(unpack_mask(pruner.prune(torch.randn(2, 8), None, Pattern(sparsity=0.5), None).mask, 8).sum()) == 8
    with pytest.raises(ValueError, match="already registered"):
        register("every-other", type("Other", (EveryOther,), {}))
    with pytest.raises(ValueError, match="lacks"):
        register("nothing", object)


def test_decorated_pruner_runs_in_the_engine(registry):
    @register("left-half")
    class LeftHalf:
        """Keeps the first columns of every row."""

        statistic = "input_norms"
        updates_weight = False

        def __init__(self, config):
            self.seen = []

        def prune(self, weight, statistic, pattern, mask):
            self.seen.append((weight.shape, statistic.shape))
            kept = torch.arange(weight.shape[1]) < round((1 - pattern.sparsity) * weight.shape[1])
            return Pruned(pack_mask(kept.expand(weight.shape).contiguous()))

    assert LeftHalf.__name__ == "LeftHalf", "the decorator gives the class back"
    model = tiny_llama(layers=1)
    wrap_model(model, rank=2, scaling=2.0)
    calibration = CalibrationConfig(data="unused", samples=2, length=8, cka_samples=2)
    ids = torch.randint(0, 90, (2, 8))
    engine = Engine(model, ids, PruneConfig(pruner="left-half", sparsity=0.5), AllocationConfig(), calibration)
    engine.run_round(RoundPlan(1, 0.5, 2, 0))
    layers = wrapped_linears(model).values()
    assert engine.pruner.seen == [(m.weight.shape, (m.in_features,)) for m in layers]
    for layer in layers:
        half = layer.in_features // 2
        assert bool(layer.mask_bool()[:, :half].all()) and not bool(layer.mask_bool()[:, half:].any())


def test_unknown_pruner_lists_the_known():
    with pytest.raises(RecipeError, match="'wandaa'; expected one of magnitude, sparsegpt, wanda$"):
        get_pruner(PruneConfig(pruner="wandaa", sparsity=0.5))


@pytest.mark.parametrize(
    "bad", [{}, {"sparsity": 0.5, "keep_n": 2, "m": 4}, {"keep_n": 2}, {"sparsity": 1.0}, {"keep_n": 5, "m": 4}]
)
def test_bad_patterns(bad):
    with pytest.raises(ValueError, match="Pattern|sparsity|keep_n"):
        Pattern(**bad)


def test_linears_with_the_same_hessian_share_its_factor(monkeypatch):
    from losa.pruners import sparsegpt

    factored = []

    def count(hessian, damping):
        factored.append(hessian)
        return inverse_factor(hessian, damping)

    monkeypatch.setattr(sparsegpt, "inverse_factor", count)
    pruner = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5))
    hessian, other = statistic_for(pruner, 32), statistic_for(pruner, 32, seed=1)
    weights, pattern = [torch.randn(8, 32) for _ in range(3)], Pattern(sparsity=0.5)
    for weight in weights:
        shared = pruner.prune(weight, hessian, pattern, None)
        alone = sparsegpt_prune(weight, hessian, sparsity=0.5)
        assert torch.equal(shared.weight, alone.weight) and torch.equal(shared.mask, alone.mask)
    assert len(factored) == 1
    pruner.prune(weights[0], other, pattern, None)
    pruner.prune(weights[0], hessian, pattern, None)
    assert len(factored) == 3, "the last one only is kept"
    hessian *= 2
    changed = pruner.prune(weights[0], hessian, pattern, None)
    assert len(factored) == 4
    assert torch.equal(changed.weight, sparsegpt_prune(weights[0], hessian, sparsity=0.5).weight)
    factored.clear()
    del hessian
    assert not pruner._factored, "it goes with its Hessian"
    with pytest.raises(NumericsError, match="singular"):
        pruner.prune(weights[0], -other, pattern, None)


def test_hessians_of_a_block_are_factored_together(monkeypatch):
    """Those on a GPU, each once; a singular one is told when its linear's turn comes, and a changed one done anew."""
    from losa.pruners import sparsegpt

    together, alone = [], []
    run, run_one = sparsegpt.inverse_factors, sparsegpt.inverse_factor
    monkeypatch.setattr(sparsegpt, "_factored_together", lambda hessian: True)
    monkeypatch.setattr(sparsegpt, "inverse_factors", lambda given, d: together.append(len(given)) or run(given, d))
    monkeypatch.setattr(sparsegpt, "inverse_factor", lambda given, d: alone.append(1) or run_one(given, d))
    pruner, pattern = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5)), Pattern(sparsity=0.5)
    first, second = (statistic_for(pruner, n, seed=n) for n in (32, 48))
    singular = -torch.eye(24)
    pruner.prepare([first, first, None, singular, second])
    assert together == [3]
    for hessian in (first, second, first):
        weight = torch.randn(8, len(hessian))
        expected = sparsegpt_prune(weight, hessian, sparsity=0.5)
        assert torch.equal(pruner.prune(weight, hessian, pattern, None).weight, expected.weight)
    with pytest.raises(NumericsError, match="singular"):
        pruner.prune(torch.randn(8, 24), singular, pattern, None)
    assert not alone
    first *= 2
    weight = torch.randn(8, 32)
    expected = sparsegpt_prune(weight, first, sparsity=0.5)
    assert torch.equal(pruner.prune(weight, first, pattern, None).weight, expected.weight) and alone == [1]
    pruner.prepare([first, second])
    del first, second, hessian
    assert not pruner._factored
    pruner.prepare([torch.full((3, 3), float("nan")), torch.eye(3)])
    pruner.prepare([torch.eye(3), None])
    assert together == [3, 2, 2] and not pruner._factored
