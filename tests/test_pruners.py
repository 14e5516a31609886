"""The pruners behind their protocol: exact counts, nesting, failure policy, a pruner of one's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.errors import NumericsError, RecipeError
from losa.pruners import Pattern, Pruned, Pruner, get_pruner, register
from losa.recipe import PruneConfig
from losa_kernels import pack_mask, unpack_mask

NAMES = ["magnitude", "wanda", "sparsegpt"]


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


def test_singular_hessian_policy():
    weight, bad = torch.randn(4, 8), -torch.eye(8)
    with pytest.raises(NumericsError, match="on_singular"):
        get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5)).prune(weight, bad, Pattern(sparsity=0.5), None)
    lenient = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5, on_singular="wanda"))
    result = lenient.prune(weight, bad, Pattern(sparsity=0.5), None)
    assert result.weight is None and result.damping == float("inf")
    assert int(unpack_mask(result.mask, 8).sum()) == 16


def test_own_pruner():
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


def test_unknown_pruner_lists_the_known():
    with pytest.raises(RecipeError, match="magnitude, sparsegpt, wanda|every-other"):
        get_pruner(PruneConfig(pruner="wandaa", sparsity=0.5))


@pytest.mark.parametrize(
    "bad", [{}, {"sparsity": 0.5, "keep_n": 2, "m": 4}, {"keep_n": 2}, {"sparsity": 1.0}, {"keep_n": 5, "m": 4}]
)
def test_bad_patterns(bad):
    with pytest.raises(ValueError, match="Pattern|sparsity|keep_n"):
        Pattern(**bad)
