"""Transposed linears and stacks of experts of a model that processes hold together: wrapped, merged, put back."""

from __future__ import annotations

import pytest

from tests.helpers.processes import run_groups
from tests.helpers.workers.sharded_forms import MODELS, SHARD_SIZES


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By the number of processes: what each of them found."""
    return run_groups("sharded_forms", list(SHARD_SIZES), tmp_path_factory.mktemp("forms"))


@pytest.mark.subprocess
@pytest.mark.parametrize("name", [*MODELS, "some"])
@pytest.mark.parametrize("processes", SHARD_SIZES)
def test_as_with_a_whole_model(found, processes, name):
    """Of two or of four experts one of three processes has no row."""
    for each in found[processes]:
        assert each[name] == dict.fromkeys(each[name], True)


@pytest.mark.subprocess
@pytest.mark.parametrize("processes", SHARD_SIZES)
def test_a_stack_that_computes_something_else_stays_in_shards(found, processes):
    assert all(each["no stack"] == [["model.layers.0.mlp"], False] for each in found[processes])


@pytest.mark.subprocess
@pytest.mark.parametrize("processes", SHARD_SIZES)
def test_processes_fail_together_and_put_everything_back(found, processes):
    stack = "model.layers.1.mlp.experts"
    for each in found[processes]:
        error, put_back = each["no memory"]
        assert put_back and error in (
            f"LosaError: {stack}: MemoryError: a test's",  # in process 1 itself
            "LosaError: process 1: MemoryError: a test's",
        )
        others = processes - 1
        assert each["another answer"] == [
            f"ModelError: {stack}: its linears compute what it does in {others} of {processes} processes",
            True,
        ]
