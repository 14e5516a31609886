"""SparseGPT: the kernel with the recipe's settings, what a singular Hessian leads to, and factors that are shared."""

from __future__ import annotations

import pytest
import torch

from losa.errors import NumericsError, RecipeError
from losa.pruners import Pattern, get_pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, sparsegpt_prune, unpack_mask, wanda_mask
from losa_kernels.pruning import inverse_factor
from tests.helpers.pruning import statistic_for


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


def test_fallback_is_wanda_on_the_hessians_diagonal():
    weight, norms = torch.randn(6, 16), torch.randint(1, 9, (16,)) / 4  # exact squares
    # Off-diagonal entries far above Cauchy-Schwarz: indefinite however much of the diagonal is added.
    hessian = torch.full((16, 16), -100.0).fill_diagonal_(0) + torch.diag(norms.square())
    mask = pack_mask(torch.rand(6, 16) < 0.8)
    pruner = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5, on_singular="wanda"))
    for pattern in (Pattern(sparsity=0.5), Pattern(keep_n=2, m=4)):
        result = pruner.prune(weight, hessian, pattern, mask)
        whole = pattern.sparsity is not None  # as SparseGPT counts
        assert torch.equal(result.mask, wanda_mask(weight, norms, mask=mask, whole=whole, **pattern.as_kwargs()))
        assert result.weight is None and result.damping == float("inf")


def test_singular_hessian_policy():
    weight, bad = torch.randn(4, 8), -torch.eye(8)
    with pytest.raises(NumericsError, match="on_singular"):
        get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5)).prune(weight, bad, Pattern(sparsity=0.5), None)
    lenient = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5, on_singular="wanda"))
    result = lenient.prune(weight, bad, Pattern(sparsity=0.5), None)
    assert result.weight is None and result.damping == float("inf")
    assert int(unpack_mask(result.mask, 8).sum()) == 16


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
    """Hessians on a GPU, each once. A singular one fails at its linear's turn; a changed one is factored anew."""
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
