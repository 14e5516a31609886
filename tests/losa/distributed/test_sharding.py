"""Parameters that several processes hold together: whole for a while, changed, sharded anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.processes import run_workers


def check(found: dict, processes: int) -> None:
    for true in ("names", "tied", "same", "logits", "freed", "failing call", "shared", "trained"):
        assert found[true] is True, true
    for none in ("values", "after calls", "after a failure", "values after changes"):
        assert found[none] == [], none
    assert found["device"] == "cpu"
    assert found["kept"] == found["kept expected"]
    assert found["changed"] == found["expected changes"]
    # Uneven rows leave a little more to some processes: at most a row of each parameter.
    assert found["held"] <= found["all"] / processes * 1.2


@pytest.mark.subprocess
@pytest.mark.parametrize(("processes", "shard_sizes"), [(3, [0]), (4, [2, 4])])
def test_a_sharded_model(tmp_path: Path, processes: int, shard_sizes: list[int]):
    results = run_workers("sharding", processes, tmp_path, *map(str, shard_sizes))
    for size, *found in zip(shard_sizes, *(result["sharded"] for result in results), strict=True):
        for each in found:
            check(each, size or processes)
        assert sum(each["held"] for each in found) == found[0]["all"] * processes // (size or processes)
    assert [result["mixed"] for result in results] == [[]] * processes
    collectives = [result["collectives"] for result in results]
    assert all(each["slice"] for each in collectives)
    assert collectives[-1]["sum"] == [processes * (processes + 1) / 2] * 3
    assert [each["last"] for each in collectives] == [[processes - 1]] * processes
    assert sum((each["share"] for each in collectives), []) == list(range(7))
    assert all(len(each["share"]) <= 4 and each["share"][:1] != [1] for each in collectives)
