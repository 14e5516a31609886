"""Parameters that several processes hold together: whole for a while, changed, sharded anew."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.processes import run_groups
from tests.helpers.tiny import EPS
from tests.helpers.workers.sharding import SHARD_SIZES, batch, two_layers


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


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> dict[int, list[dict]]:
    """By number of processes, what each finds."""
    return run_groups("sharding", list(SHARD_SIZES), tmp_path_factory.mktemp("sharding"))


@pytest.mark.subprocess
@pytest.mark.parametrize("processes", SHARD_SIZES)
def test_a_sharded_model(several, processes: int):
    results = several[processes]
    for size in SHARD_SIZES[processes]:
        found = [result["sharded"][str(size)] for result in results]
        for each in found:
            check(each, size)
        assert sum(each["held"] for each in found) == found[0]["all"] * processes // size
    assert [result["mixed"] for result in results] == [[]] * processes
    collectives = [result["collectives"] for result in results]
    assert all(each["slice"] for each in collectives)
    assert collectives[-1]["sum"] == [processes * (processes + 1) / 2] * 3
    assert [each["last"] for each in collectives] == [[processes - 1]] * processes
    assert sum((each["share"] for each in collectives), []) == list(range(7))
    assert all(len(each["share"]) <= 4 and each["share"][:1] != [1] for each in collectives)


@pytest.mark.subprocess
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("processes", SHARD_SIZES)
def test_layers_in_shards_compute_as_one(several, processes, checkpointing):
    """FSDP2 shards mask and adapter too. It takes the mean over processes of the adapters' gradients; each process has
    its own input."""
    model, inputs = two_layers(), batch(processes).requires_grad_()
    outputs = torch.stack([model(x) for x in inputs])
    sum(y.square().mean() for y in outputs).backward()
    assert inputs.grad is not None
    gradients = {name: p.grad / processes for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    for rank, result in enumerate(several[processes]):
        found = result["layers"][checkpointing]
        assert_close(found["output"], outputs[rank])
        assert_close(found["input"], inputs.grad[rank])
        assert found["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(found["gradients"][name], gradient)


def assert_close(found: list, expected: torch.Tensor) -> None:
    assert (torch.tensor(found) - expected).abs().max() <= 32 * EPS * expected.abs().max()
