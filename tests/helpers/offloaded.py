"""Runs that prune at once, in memory or block by block, and their outputs compared."""

from __future__ import annotations

import torch

from losa.recipe.reading import parse_recipe
from losa.run.pipeline import run_recipe
from losa_kernels.tensors import as_bits
from tests.helpers.exports import tensors_of
from tests.helpers.runs import settings

# Rates of blocks for methods without rounds.
ALL = {"allocation": {"mean_rank": 2, "rank_max": 6, "apply_to": "all"}}


def run(made, output, resume=False, **sections):
    return run_recipe(parse_recipe(settings(made, output, method="prune_only", **sections)), resume=resume)


def assert_same_output(ours, theirs):
    found, expected = tensors_of(ours), tensors_of(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(as_bits(found[name]), as_bits(tensor)), name


def assert_same_record(ours, theirs):
    assert ours.masks == theirs.masks and ours.unmasked == theirs.unmasked
    for mine, other in zip(ours.results, theirs.results, strict=True):
        assert vars(mine) | {"seconds": 0} == vars(other) | {"seconds": 0}
    for mine, other in zip(ours.rounds, theirs.rounds, strict=True):
        assert vars(mine) | {"seconds": 0} == vars(other) | {"seconds": 0}


class Killed(BaseException):
    """A process that ends here."""


def killed(*args, **kwargs):
    raise Killed
