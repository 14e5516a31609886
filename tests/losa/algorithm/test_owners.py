"""How the linears of a block are dealt out to processes."""

from __future__ import annotations

import pytest

from losa.algorithm.owners import deal
from losa.pruners import LinearShape, Pruner, get_pruner
from losa.recipe.sections import PruneConfig

WANDA, SPARSEGPT = (get_pruner(PruneConfig(sparsity=0.5, pruner=name)) for name in ("wanda", "sparsegpt"))


class OfBlocks(Pruner):
    def prune_block(self, weights, statistics, pattern, masks):
        raise AssertionError


def dealt(weights: list[int], processes: int, index: int = 0, pruner: Pruner = WANDA) -> list[int]:
    """The owners of groups with so many weights each; Wanda makes no products, so that weights alone count."""
    return deal([[LinearShape(count, 1)] for count in weights], pruner, processes, index, on_gpu=False)


@pytest.mark.parametrize(
    "weights, processes, owners",
    [
        ([6, 5, 4, 1], 2, [0, 1, 1, 0]),
        ([1, 4, 5, 6], 2, [0, 1, 1, 0]),
        ([3, 3, 3, 3], 3, [0, 1, 2, 0]),
        ([3, 9], 4, [1, 0]),
        ([3, 9], 1, [0, 0]),
    ],
)
def test_the_most_expensive_group_first_to_the_least_loaded_process(weights, processes, owners):
    assert dealt(weights, processes) == owners


def test_the_next_block_begins_with_the_next_process():
    assert [dealt([9, 3], 3, index) for index in range(4)] == [[0, 1], [1, 2], [2, 0], [0, 1]]


def test_a_whole_block_has_one_owner():
    assert [dealt([9, 3, 1], 2, index, OfBlocks(PruneConfig(sparsity=0.5))) for index in range(3)] == [
        [0, 0, 0],
        [1, 1, 1],
        [0, 0, 0],
    ]


def test_a_shared_input_is_factored_once():
    """Three linears of 100 inputs have one Hessian of 100 columns, which is less work than one of 110."""
    three, one = [LinearShape(100, 1)] * 3, [LinearShape(110, 1)]
    assert deal([three, one], SPARSEGPT, 2, 0, on_gpu=False) == [1, 0]
