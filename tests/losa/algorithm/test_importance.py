"""Importance is Eq. 4, and bad similarities are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losa.algorithm.importance import (
    atp_importance,
    cka_importance,
    dlp_importance,
    fisher_importance,
    get_importance,
    owl_importance,
    register_importance,
    uniform_importance,
    update_importance,
)
from losa.recipe import rates
from losa.recipe.sections import AllocationConfig
from tests.helpers.similarity import similarity


def test_importance_is_the_equation():
    matrix = similarity(5, 0)
    c = torch.tensor([sum(matrix[i, j] for j in range(5) if j != i) for i in range(5)], dtype=torch.float64)
    assert torch.allclose(cka_importance(matrix, beta=3.0), torch.exp(-3.0 * c / c.sum()))


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(3, 4), torch.ones(0, 0), torch.full((2, 2), float("nan"))])
def test_bad_similarity_is_refused(bad):
    with pytest.raises(ValueError, match="similarity"):
        cka_importance(bad)


def test_blocks_without_redundancy_are_equally_important():
    assert cka_importance(torch.eye(4)).tolist() == [1, 1, 1, 1]


def test_owl_counts_outliers_over_the_whole_block():
    """Of 12 scores with mean 2.5: 20 is above 5 means, 12 is not."""
    blocks = [[torch.tensor([[20.0, 0, 0]]), torch.tensor([[1.0, 0, 5], [2, 2, 0], [0, 0, 0]])], [torch.ones(2, 6)]]
    assert owl_importance(blocks).tolist() == [1 / 12, 0]
    assert owl_importance(blocks, multiple=1.9).tolist() == [2 / 12, 0]


def test_dlp_compares_medians_of_whole_blocks():
    blocks = [[torch.tensor([[1.0, 9]]), torch.tensor([[2.0], [3.0], [8.0]])], [torch.full((1, 5), 1.0)]]
    assert dlp_importance(blocks).tolist() == [1 - 3 / 4, 1 - 1 / 4]
    assert dlp_importance([[torch.zeros(2, 2)], [torch.zeros(2, 2)]]).tolist() == [1, 1]
    generator = torch.Generator().manual_seed(0)
    parts = [[torch.rand(n, 40, generator=generator) ** 9 for n in sizes] for sizes in ((7, 30), (12, 1))]
    medians = torch.stack([torch.cat(part).median() for part in parts]).double()
    assert torch.equal(dlp_importance(parts), 1 - medians / medians.sum())


def test_less_change_is_less_important_and_so_is_a_later_block():
    assert update_importance(torch.tensor([0.75, 0.5])).tolist() == [0.25, 0.5]
    assert atp_importance(torch.arange(3)).tolist() == [0, -1, -2]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.1, 100), st.integers(0, 10**6))
def test_beta_never_changes_the_order_of_importance(count, beta, seed):
    matrix = similarity(count, seed)
    assert torch.equal(cka_importance(matrix, beta).argsort(), cka_importance(matrix).argsort())


def test_every_name_of_recipes_has_a_function():
    assert {name: get_importance(name) for name in rates.RATES} == {
        "cka": cka_importance,
        "uniform": uniform_importance,
        "cka_normalised": cka_importance,
        "owl": owl_importance,
        "dlp": dlp_importance,
        "update": update_importance,
        "atp": atp_importance,
        "fisher": fisher_importance,
    }
    assert [name for name in rates.RATES if rates.compares_samples(name)] == ["cka", "cka_normalised"]
    assert uniform_importance([]) is None


def test_registered_names_are_settings_of_recipes(own_names):
    def depth(linears):
        return torch.arange(len(linears))

    with pytest.raises(ValueError, match="Input should be 'cka', 'uniform', .* or 'fisher', got 'depth'"):
        AllocationConfig(rates="depth")
    add = register_importance("depth", needs="linears", fill="smooth", delta=0.2)
    assert add(depth) is depth is add(depth)
    assert AllocationConfig(rates="depth").rates == "depth" and get_importance("depth") is depth
    assert rates.RATES["depth"] == rates.Rates("linears", "smooth", 0.2)
    for bad in ("dept", 1, None, ["depth"]):
        with pytest.raises(ValueError, match="Input should be 'cka', .* 'fisher' or 'depth', got "):
            AllocationConfig(rates=bad)
    with pytest.raises(ValueError, match="importance 'depth': already registered"):
        register_importance("depth", needs="linears")(cka_importance)
    with pytest.raises(ValueError, match=r"importance 'cka': already registered as Rates\(needs='similarity'"):
        register_importance("cka", needs="linears")(depth)
    with pytest.raises(ValueError, match="importance 'wide': needs: expected similarity, .* or losses, got 'grams'"):
        register_importance("wide", needs="grams")
    with pytest.raises(ValueError, match="importance 'wide': fill: expected lp, smooth or curves, got 'flat'"):
        register_importance("wide", needs="linears", fill="flat")
    with pytest.raises(ValueError, match="importance 'wide': fill: curves comes with needs losses, got 'linears'"):
        register_importance("wide", needs="linears", fill="curves")
