"""Wanda-sp: which heads and channels go, against the formula in fp64, and how many."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.errors import NumericsError, RecipeError
from losa.pruners import Counts, Pattern, Structure, get_pruner
from losa.pruners.structure import ROLES
from losa.recipe.sections import PruneConfig
from losa_kernels import unpack_mask

NAMES = {role: f"part.{role}" for role in ROLES}


def structure(groups=3, per_group=2, channels=20, head_dim=4, hidden=24) -> Structure:
    choices = tuple(itertools.product(range(1, groups + 1), range(1, per_group + 1)))
    return Structure(hidden, head_dim, Counts(groups, per_group, channels), NAMES, choices)


def problem(of: Structure, seed=0):
    """Weights and input norms of a block by name."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = of.full.heads * of.head_dim, of.full.groups * of.head_dim
    out = {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "gate_proj": of.full.channels,
        "up_proj": of.full.channels,
    }
    shapes = {role: (out[role], of.hidden) if role in out else (of.hidden, 0) for role in ROLES}
    shapes |= {"o_proj": (of.hidden, queries), "down_proj": (of.hidden, of.full.channels)}
    weights = {NAMES[role]: torch.randn(shape, generator=generator) for role, shape in shapes.items()}
    norms = {name: torch.rand(weight.shape[1], generator=generator) for name, weight in weights.items()}
    return weights, norms


def pruned(of: Structure, weights, norms, sparsity: float, masks=None) -> dict[str, torch.Tensor]:
    pruner = get_pruner(PruneConfig(pruner="wanda_sp", sparsity=0.5))
    pruner.structure = of
    masks = dict.fromkeys(weights) if masks is None else masks
    return {name: found.mask for name, found in pruner.prune_block(weights, norms, Pattern(sparsity=sparsity), masks)}


def kept_parts(of: Structure, masks) -> tuple[set[int], set[int], set[int]]:
    """Query heads, groups and channels that masks keep, which keep nothing but products of rows and columns."""
    kept = {r: unpack_mask(masks[NAMES[r]], of.hidden) for r in ROLES if r not in ("o_proj", "down_proj")}
    kept["o_proj"] = unpack_mask(masks[NAMES["o_proj"]], of.full.heads * of.head_dim).T
    kept["down_proj"] = unpack_mask(masks[NAMES["down_proj"]], of.full.channels).T
    rows = {role: mask.all(1) for role, mask in kept.items()}
    assert all(torch.equal(rows[role], mask.any(1)) for role, mask in kept.items()), "whole rows and columns"
    for one, other in (("q_proj", "o_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("up_proj", "down_proj")):
        assert torch.equal(rows[one], rows[other])
    sizes = {"q_proj": of.head_dim, "k_proj": of.head_dim, "up_proj": 1}
    parts = []
    for role, size in sizes.items():
        whole = rows[role].view(-1, size)
        assert torch.equal(whole.all(1), whole.any(1)), "whole heads"
        parts.append({i for i, keeps in enumerate(whole.all(1).tolist()) if keeps})
    return tuple(parts)


def test_the_lowest_scores_go_as_the_formula_says():
    of = structure()
    weights, norms = problem(of)
    heads, groups, channels = kept_parts(of, pruned(of, weights, norms, 0.5))
    score = {
        role: [
            sum(abs(float(w)) * float(norms[NAMES[role]][j]) for w in weights[NAMES[role]][:, j]) / of.hidden
            for j in range(weights[NAMES[role]].shape[1])
        ]
        for role in ("o_proj", "down_proj")
    }
    by_head = [sum(score["o_proj"][4 * h : 4 * h + 4]) for h in range(6)]
    # Of 6 query heads and 3 key heads, 2 and 2 are nearest to half: 4 of 9.
    assert (len(groups), len(heads)) == (2, 2)
    best = [max((2 * g, 2 * g + 1), key=by_head.__getitem__) for g in range(3)]
    assert heads == set(sorted(best, key=by_head.__getitem__)[1:])
    assert groups == {h // 2 for h in heads}
    assert channels == set(sorted(range(20), key=score["down_proj"].__getitem__)[-len(channels) :])
    removed = 1 - of.weights(Counts(2, 1, len(channels))) / of.weights(of.full)
    assert removed == pytest.approx(0.5, abs=1.5 * of.hidden / of.weights(of.full))


def test_rounds_are_nested_and_count_what_is_gone():
    of = structure()
    weights, norms = problem(of)
    before = kept_parts(of, masks := pruned(of, weights, norms, 0.3))
    # Other weights, such as training leaves: what has gone would score highest now.
    heads, _, channels = before
    changed = {name: weight.clone() for name, weight in weights.items()}
    changed[NAMES["o_proj"]][:, [j for j in range(24) if j // 4 not in heads]] = 100.0
    changed[NAMES["down_proj"]][:, [j for j in range(20) if j not in channels]] = 100.0
    after = kept_parts(of, pruned(of, changed, norms, 0.6, masks))
    assert all(late <= early for late, early in zip(after, before, strict=True)) and after != before
    again = kept_parts(of, pruned(of, changed, norms, 0.3, masks))
    assert again == before, "nothing more than was asked"
    assert kept_parts(of, pruned(of, changed, norms, 0.6))[0] - heads, "without masks the best heads are kept"


def test_ties_go_to_the_lowest_index():
    of = structure(groups=4, per_group=1, channels=8)
    weights, norms = problem(of)
    flat = {name: torch.ones_like(weight) for name, weight in weights.items()}
    ones = {name: torch.ones_like(norm) for name, norm in norms.items()}
    assert kept_parts(of, pruned(of, flat, ones, 0.5)) == ({2, 3}, {2, 3}, {4, 5, 6, 7})


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(4, 64), st.floats(0, 0.95))
def test_counts_are_as_near_as_whole_heads_and_channels_allow(groups, per_group, channels, sparsity):
    of = structure(groups, per_group, channels)
    found, wanted = of.nearest(sparsity, of.full), (1 - sparsity) * of.weights(of.full)
    missed = abs(of.weights(found) - wanted)
    nearest = min(
        abs(of.weights(Counts(g, p, c)) - wanted) for g, p in of.choices for c in range(1, channels + 1)
    )  # fmt: skip
    assert missed <= max(nearest, 1.5 * of.hidden) + 1
    later = of.nearest(min(sparsity + 0.1, 0.99), found)
    assert later.groups <= found.groups and later.per_group <= found.per_group and later.channels <= found.channels


def test_what_it_cannot_do_is_named():
    with pytest.raises(RecipeError, match="prune.pattern: 'wanda_sp' removes whole heads .*got '2:4'"):
        get_pruner(PruneConfig(pruner="wanda_sp", pattern="2:4"))
    with pytest.raises(RecipeError, match="prune.targets: .*expected null, got 'q_proj'"):
        get_pruner(PruneConfig(pruner="wanda_sp", sparsity=0.5, targets="q_proj"))
    of = structure()
    weights, norms = problem(of)
    weights[NAMES["down_proj"]][1, 2] = float("nan")
    with pytest.raises(NumericsError, match="^part.down_proj: weight: expected finite"):
        pruned(of, weights, norms, 0.5)
