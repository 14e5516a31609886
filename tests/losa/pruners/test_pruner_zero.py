"""Pruner-Zero against its formula in fp64."""

from __future__ import annotations

import pytest
import torch

from losa.errors import NumericsError
from losa.pruners import Pattern, get_pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, unpack_mask
from tests.helpers.pruning import expected_nested

PRUNER = get_pruner(PruneConfig(pruner="pruner_zero", sparsity=0.5))


@pytest.mark.parametrize("pattern", [Pattern(sparsity=0.6), Pattern(keep_n=2, m=4), Pattern(keep_n=3, m=8)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_the_smallest_scores_of_a_row_or_group_go(pattern, nested):
    generator = torch.Generator().manual_seed(int(nested))
    weight, gradients = (torch.randn(6, 40, generator=generator) for _ in range(2))
    gradients = gradients.square() + 0.3
    gone = torch.rand(6, 40, generator=generator) < (0.3 if nested else 0)
    mask = PRUNER.prune(weight, gradients, pattern, pack_mask(~gone) if nested else None).mask
    wide = gradients.double()
    scores = weight.double().abs() ** 2 * ((wide - wide.min()) / (wide.max() - wide.min()))
    width, count = (40, int(0.6 * 40)) if pattern.m is None else (pattern.m, pattern.m - pattern.keep_n)
    expected = expected_nested(scores.view(-1, width), gone.view(-1, width), count)
    assert torch.equal(unpack_mask(mask, 40).view(-1, width), expected)


def test_magnitudes_decide_where_gradients_are_equal():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    for gradients in (torch.zeros(1, 4), torch.full((1, 4), 7.0)):
        mask = PRUNER.prune(weight, gradients, Pattern(sparsity=0.5), None).mask
        assert unpack_mask(mask, 4).tolist() == [[True, False, True, False]]


def test_values_that_are_not_finite_are_named():
    whole = torch.ones(2, 4)
    broken = whole.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(NumericsError, match="weight: expected finite values, got nan or inf"):
        PRUNER.prune(broken, whole, Pattern(sparsity=0.5), None)
    with pytest.raises(NumericsError, match="gradients: expected finite values, got nan or inf"):
        PRUNER.prune(whole, broken, Pattern(sparsity=0.5), None)
