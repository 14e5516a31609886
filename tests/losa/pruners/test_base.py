"""What holds for every pruner: exact counts, nesting, refused values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.errors import NumericsError
from losa.pruners import Pattern, Pruner, get_pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, unpack_mask
from tests.helpers.pruning import expected_nested, statistic_for

NAMES = ["magnitude", "wanda", "sparsegpt", "alps", "pruner_zero"]


@pytest.mark.parametrize("name", NAMES)
def test_protocol_and_nesting(name):
    pruner = get_pruner(PruneConfig(pruner=name, sparsity=0.5))
    assert isinstance(pruner, Pruner)
    weight = torch.randn(16, 32)
    statistic = statistic_for(pruner, 32, rows=16)
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


@pytest.mark.parametrize("sparsity, size, gone", [(0.7, 10, 7), (0.29, 100, 29), (0.0, 10, 0), (1 / 3, 10, 3)])
def test_counts_are_exact_where_floats_are_not(sparsity, size, gone):
    weight = torch.randn(1, size)
    for name in ("magnitude", "wanda"):
        pruner = get_pruner(PruneConfig(pruner=name, sparsity=0.5))
        mask = pruner.prune(weight, statistic_for(pruner, size), Pattern(sparsity=sparsity), None).mask
        assert int(unpack_mask(mask, size).sum()) == size - gone, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", [Pattern(sparsity=0.5), Pattern(keep_n=2, m=4)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(name, pattern, bad):
    pruner = get_pruner(PruneConfig(pruner=name, sparsity=0.5))
    weight = torch.randn(4, 8)
    weight[1, 3] = bad
    with pytest.raises(NumericsError, match="weight: expected finite"):
        pruner.prune(weight, statistic_for(pruner, 8, rows=4), pattern, None)


@pytest.mark.parametrize(
    "bad", [{}, {"sparsity": 0.5, "keep_n": 2, "m": 4}, {"keep_n": 2}, {"sparsity": 1.0}, {"keep_n": 5, "m": 4}]
)
def test_bad_patterns(bad):
    with pytest.raises(ValueError, match="Pattern|sparsity|keep_n"):
        Pattern(**bad)
