"""ALPS as a pruner: the op with the recipe's settings, a spectrum that linears share, singular Hessians, its cost."""

from __future__ import annotations

import math

import pytest
import torch

from losa.errors import NumericsError
from losa.pruners import LinearShape, Pattern, PruningShape, get_pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import alps_prune, pack_mask, unpack_mask
from losa_kernels.pruning import scaled_spectrum
from tests.helpers.pruning import statistic_for


def test_it_is_the_op_with_the_recipes_settings():
    weight, mask = torch.randn(8, 32), pack_mask(torch.rand(8, 32) < 0.9)
    pruner = get_pruner(PruneConfig(pruner="alps", sparsity=0.5, damping=0.2))
    hessian = statistic_for(pruner, 32)
    result = pruner.prune(weight, hessian, Pattern(sparsity=0.5), mask)
    expected = alps_prune(weight, hessian, sparsity=0.5, damping=0.2, mask=mask)
    assert torch.equal(result.weight, expected.weight) and torch.equal(result.mask, expected.mask)
    assert result.damping == 0.2 and result.loss == pytest.approx(float(expected.loss.sum()))
    assert not torch.equal(result.weight, alps_prune(weight, hessian, sparsity=0.5, mask=mask).weight)


def test_linears_with_the_same_hessian_share_its_spectrum(monkeypatch):
    from losa.pruners import alps

    computed = []
    monkeypatch.setattr(alps, "scaled_spectrum", lambda h, d: computed.append(h) or scaled_spectrum(h, d))
    pruner, pattern = get_pruner(PruneConfig(pruner="alps", sparsity=0.5)), Pattern(keep_n=2, m=4)
    hessian = statistic_for(pruner, 32)
    for rows in (8, 4, 8):
        weight = torch.randn(rows, 32)
        found = pruner.prune(weight, hessian, pattern, None)
        assert torch.equal(found.weight, alps_prune(weight, hessian, keep_n=2, m=4).weight)
    assert len(computed) == 1
    computed.clear()
    del hessian
    assert not pruner._spectra, "it goes with its Hessian"


def test_singular_hessian_policy():
    weight, bad = torch.randn(4, 8), -torch.eye(8)
    with pytest.raises(NumericsError, match="on_singular"):
        get_pruner(PruneConfig(pruner="alps", sparsity=0.5)).prune(weight, bad, Pattern(sparsity=0.5), None)
    lenient = get_pruner(PruneConfig(pruner="alps", sparsity=0.5, on_singular="wanda"))
    result = lenient.prune(weight, bad, Pattern(sparsity=0.5), None)
    assert result.weight is None and result.damping == float("inf")
    assert int(unpack_mask(result.mask, 8).sum()) == 16


def test_cost():
    """Of two blocks with a linear 6 -> 5 each, after 100 tokens."""
    pruner = get_pruner(PruneConfig(pruner="alps", sparsity=0.5))
    shape = PruningShape([LinearShape(6, 5)] * 2, blocks=2, tokens=100, on_gpu=True)
    sizes = {memory.what: memory.size for memory in pruner.memory(shape)}
    assert sizes == {"Hessians of a block": 4 * 36, "factorising one": 5 * 4 * 36, "pruning one linear": 10 * 4 * 30}

    products = 30 + 14  # ADMM; conjugate gradients and what is lost
    assert pruner.flops(shape) == 2 * (2 * 100 * 36 + (9 + 10) * 6**3 + 2 * products * 30 * 6)


def test_hessians_are_held_within_a_budget():
    pruner = get_pruner(PruneConfig(pruner="sparsegpt", sparsity=0.5))
    for budget, held in ((math.inf, 4 * (3 * 36 + 64)), (300.0, 300.0), (10.0, 4 * 64)):
        shape = PruningShape([LinearShape(6, 5)] * 3 + [LinearShape(8, 5)], 1, 100, on_gpu=False, statistics=budget)
        sizes = {memory.what: memory.size for memory in pruner.memory(shape)}
        assert sizes["Hessians of a block"] == held and sizes["factorising one"] == 1.25 * 4 * 64
