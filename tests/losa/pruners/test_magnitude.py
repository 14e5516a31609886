"""Magnitude: one threshold over the matrix, ties in its order, groups by themselves."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.pruners import Pattern, get_pruner
from losa.recipe.sections import PruneConfig
from losa_kernels import pack_mask, unpack_mask
from tests.helpers.pruning import expected_nested


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
