"""Pruning by several processes: what one process decides, for a share of its work, with the model whole or sharded."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.processes import run_groups

pytestmark = pytest.mark.subprocess
EPS = torch.finfo(torch.float32).eps
SEVERAL = (2, 3, 4)
# Cases whose fp32 sums are made in another order by several processes: Hessians, and gradients of reconstruction.
ROUNDED = ("sparsegpt", "regrow", "reconstructed", "gradients")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What each process found, by how many there were."""
    directory = tmp_path_factory.mktemp("pruning")
    return run_groups("pruning", [1, *SEVERAL], directory, str(directory))


@pytest.fixture(scope="module")
def cases(found) -> list[tuple[str, dict]]:
    return [(case, one) for processes in SEVERAL for each in found[processes] for case, one in each["cases"].items()]


def test_masks_and_decisions_are_one_process_s(found, cases):
    assert {case for case, _ in cases} >= {"wanda", "2:4", "sparsegpt", "regrow", "one batch", "whole blocks"}
    assert {case for case, _ in cases} >= {"reconstructed", "scores", "tokens", "cosines", "losses", "expected losses"}
    assert all("wanda" in each["cases"] for processes in SEVERAL for each in found[processes])
    for case, one in cases:
        assert all(one["counts"]) and all(one["ranks"]) and all(one["damping"]), case
        if case not in ROUNDED:
            # Whole batches are computed alike, and their sums are fp64: masks and weights are the same to the bit.
            assert one["exact"], case
        # Hessians and gradients are fp32 sums in another order. A Hessian of n columns and condition number c gives
        # weights within about n c eps; a mask may differ where two scores are as near as that.
        assert one["flipped"] <= 1e-3, case
        assert one["weights"] <= 64 * 1e3 * EPS, case
        assert one["perplexity"] <= 64 * 1e3 * EPS, case


def test_errors_and_importance_are_one_process_s(cases):
    for case, one in cases:
        rounded = 64 * 1e3 * EPS if case in ROUNDED else 1e-13
        # Wanda's errors are sums of the same fp32 numbers in fp64; a Gram is an fp32 sum over 640 features.
        bound = {"errors": rounded, "importance": 640 * EPS, "sparsity": 0}
        for key, value in one["numbers"].items():
            assert value <= bound.get(key, rounded), (case, key)


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_sharded_model_is_pruned_as_a_whole_one(found, processes):
    """To the bit: two and three processes hold it together, and four by twos."""
    assert all(all(each["sharded alike"].values()) and not each["other layers"] for each in found[processes])


@pytest.mark.parametrize("processes", SEVERAL)
def test_what_is_made_of_shards_and_what_is_made_whole(found, processes):
    for each in found[processes]:
        # Norms of 2,048 weights, in fp32.
        assert each["own importance"] <= 2048**0.5 * EPS
        assert each["made whole for ranks"] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_process_runs_its_share_of_the_forward_passes(found, processes):
    (alone,) = found[1]
    calls = [each["costs"]["calls"] for each in found[processes]]
    # Five samples go through a block to compare blocks; eight three times: dense, for the statistics, and sparse.
    assert alone["calls"] == 5 + 3 * 8 == sum(calls)
    assert max(calls) == -(-5 // processes) + 3 * -(-8 // processes)


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_mask_goes_to_all_as_a_bit_a_weight(found, processes):
    for costs in (each["costs"] for each in found[processes]):
        assert 8 * costs["masks"] == costs["weights"]
        # Rates and errors, a few numbers a block.
        assert costs["else"] < 200


@pytest.mark.parametrize("processes", SEVERAL)
def test_inputs_that_one_process_alone_has_seen(found, processes):
    """Process i feeds a and b two rows of i + 1; the last one also c; nobody feeds d."""
    statistics: dict[str, list] = {}
    for each in found[processes]:
        assert not statistics.keys() & each["experts"].keys(), "one owner each"
        statistics |= each["experts"]
    squares = 2 * sum((index + 1) ** 2 for index in range(processes))
    expected = {"a": squares, "b": squares, "c": 2 * processes**2, "d": 1}
    assert {name: value[0] for name, value in statistics.items()} == pytest.approx(expected, rel=4 * EPS)


@pytest.mark.parametrize("processes", SEVERAL)
def test_grams_in_slices_of_features(found, processes):
    for each in found[processes]:
        assert each["gram"] <= 640 * EPS
        # Of 61 columns at a time, on as many processes as have some.
        assert 0 < each["received"] <= -(-61 // processes)


@pytest.mark.parametrize("processes", (2, 3))
def test_what_fails_in_one_process_fails_in_all(found, processes):
    for index, each in enumerate(found[processes]):
        # Nobody catches an error within a pass through shards: it would wait for processes that wait in that pass.
        own = f"RuntimeError: process {index} has no memory left"
        shards = "RecipeError: {} takes gradients, and needs the model whole, not sharded"
        first = "RuntimeError: process 0 has no memory left"
        whole = first if index == 0 else f"LosaError: process 0: {first}"
        assert each["failures"] == {
            "forward pass": own if processes == 2 else whole,
            "round": "NumericsError: calibration: non-finite input of model.layers.0.self_attn.q_proj at samples 3..3",
            "failing": "NumericsError: model.layers.0.mlp.gate_proj: too wide",
            "unsummed": "RecipeError: prune.pruner: 'unsummed': its statistic 'unsummed' makes no tensor `total` in "
            "__init__, which several processes add up",
            "gradients": shards.format("prune.pruner: pruner_zero") if processes == 2 else "nothing",
            "rates": shards.format("allocation.rates: fisher") if processes == 2 else "nothing",
            "stopped": "Stopped: stopped by SIGUSR1; run again with --resume",
            "perplexity": "NumericsError: evaluation: the loss is nan in windows 2..3 of 6",
            "disagreeing": "ModelError: block.b: shares its input with a in some batches only",
            "not finite": "NumericsError: calibration: non-finite input of block.a at sample 0",
        }
