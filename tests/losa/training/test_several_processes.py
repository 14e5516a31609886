"""Several processes train as one: DDP, FSDP2 and HSDP; uneven rows and batches; going on in a round's middle."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from losa.distributed.sharding import make_sharding, shard_module
from losa.errors import LosaError
from losa.modules.gated_lora import SoRALinear
from losa.modules.lora import LoRALinear
from losa.modules.masked_linear import MaskedLinear
from losa.training.shell import make_shell
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.processes import run_groups
from tests.helpers.tiny import wrap
from tests.helpers.training import Experts, odd_llama
from tests.helpers.workers import training
from tests.helpers.workers.training import (
    LEARNING_RATE,
    clipped_round,
    distilled_gradients,
    first_gradients,
    going_on,
    round_of_experts,
    two_rounds,
)

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, with the sequences of each step in batches of two."""
    directory = tmp_path_factory.mktemp("alone")
    return two_rounds(odd_llama(), directory) | {"gradients": first_gradients(odd_llama())}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """By number of processes, what each finds."""
    directory = tmp_path_factory.mktemp("several")
    return run_groups("training", [2, 3, 4], directory, str(directory / "runs"))


CASES = [
    (2, "ddp"),
    (2, "fsdp"),
    (2, "checkpoints"),
    (3, "ddp"),
    (3, "fsdp"),
    (3, "offload"),
    (4, "hsdp"),
]


@pytest.mark.subprocess
@pytest.mark.parametrize(("processes", "case"), CASES)
def test_losses_norms_and_weights_are_one_processs(alone, several, processes, case):
    """The model is in fp64, but its norms and softmax compute in fp32. The loss is divided by the step's labels and
    multiplied by the processes before the backward pass, so that gradients differ by roundings of fp32.

    AdamW turns a gradient that is rounding itself into a step of any size up to the learning rate.
    """
    found = [result[case] for result in several[processes]]
    for each in found:
        assert each["frozen"] and each["kinds"] and each["modes"] == 0
        assert each["sharded"] == (case != "ddp")
        assert each["loss of round 2"] == pytest.approx(alone["loss of round 2"], rel=16 * EPS)
        # All processes have the very same weights.
        assert each["trained"] == found[0]["trained"]
        for name, values in alone["trained"].items():
            assert each["trained"][name] == pytest.approx(values, abs=LEARNING_RATE / 100), name
    for ours, expected in zip(found[0]["steps"], alone["steps"], strict=True):
        assert ours == pytest.approx(expected, rel=16 * EPS)
    assert [line["tokens"] for line in alone["steps"]] == [6 * 12, 6 * 12, 4 * 12] * 2


@pytest.mark.subprocess
def test_dense_adapters_in_shards(several, tmp_path):
    alone = two_rounds(odd_llama(layer=LoRALinear), tmp_path)
    for found in (result["dense adapters"] for result in several[2]):
        assert found["frozen"] and found["kinds"] and found["sharded"]
        for name, values in alone["trained"].items():
            assert found["trained"][name] == pytest.approx(values, abs=LEARNING_RATE / 100), name
    for ours, expected in zip(several[2][0]["dense adapters"]["steps"], alone["steps"], strict=True):
        assert ours == pytest.approx(expected, rel=16 * EPS)


@pytest.mark.subprocess
@pytest.mark.parametrize(("processes", "case"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp")])
def test_gradients_are_one_processs(alone, several, processes, case):
    for each in several[processes]:
        for name, values in alone["gradients"].items():
            largest = max(map(abs, values))
            assert each[case]["gradients"][name] == pytest.approx(values, abs=16 * EPS * largest), name
            assert largest > 0


@pytest.mark.subprocess
@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_distilled_gradients_are_one_processs(several, case):
    alone = distilled_gradients(odd_llama())
    for found in (result[case]["distilled"] for result in several[2]):
        assert found.keys() == alone.keys() and any(name.endswith("norm.trained_weight") for name in found)
        for name, values in alone.items():
            assert found[name] == pytest.approx(values, abs=16 * EPS * max(map(abs, values))), name


@pytest.mark.subprocess
@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_two_processes_train_to_the_bits_of_one(several, case):
    """Of two batches a step two processes add up the gradients that one process adds up."""
    expected = {
        "clipped": clipped_round(odd_llama(torch.float32)),
        "weights": clipped_round(odd_llama(torch.float32, layer=MaskedLinear)),
        "gates": clipped_round(odd_llama(torch.float32, layer=SoRALinear), 5.0),
    }
    for what, values in expected.items():
        assert [result[case][what] for result in several[2]] == [values] * 2, what
    closed = [gate == 0 for name, gates in expected["gates"].items() if name.endswith("gate") for gate in gates]
    assert 0 < sum(closed) < len(closed)


@pytest.mark.subprocess
def test_whole_models_are_not_sent_again(several):
    """It would hide that processes differ."""
    assert [result["norm"] for result in several[2]] == [1, 2]


def test_old_versions_of_torch_do_not_share_experts(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params", raising=False)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        for model in (odd_llama(experts=True), odd_llama()):
            shard_module(model, make_sharding(torch.device("cpu")))
            if isinstance(model.model.layers[0].mlp, Experts):
                with pytest.raises(LosaError, match="cannot be trained in shards by this version of torch"):
                    make_shell(nn.Sequential(model), model)
            else:
                make_shell(nn.Sequential(model), model)
        # Of a stack one product gives gradients to all experts, unless adapters drop inputs.
        for dropout_p, targets in ((0.0, None), (0.1, None), (0.1, ["q_proj"]), (0.0, ["up_proj", "q_proj"])):
            mixture = of_kind(KINDS["Mixtral"])
            wrap(mixture, dropout_p=dropout_p, targets=targets)
            shard_module(mixture, make_sharding(torch.device("cpu")))
            if dropout_p and targets is None:
                with pytest.raises(LosaError, match="adapters are not masked-LoRA without dropout"):
                    make_shell(nn.Sequential(mixture), mixture)
            else:
                make_shell(nn.Sequential(mixture), mixture)
    finally:
        dist.destroy_process_group()


@pytest.mark.subprocess
@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_experts_that_a_process_does_not_reach(several, tmp_path, case):
    model = odd_llama(experts=True)
    alone = round_of_experts(model, tmp_path)
    # After the two tokens that the loss asks about: of the first step one process has four texts, the other two.
    first = model.model.layers[0].mlp.chosen[1:7]
    assert set(first[:4]) != set(first[4:]) and len(set(first)) < 4
    for found in (result[case]["experts"] for result in several[2]):
        for name, values in alone["trained"].items():
            assert found["trained"][name] == pytest.approx(values, abs=LEARNING_RATE / 100), name
    for ours, expected in zip(several[2][0][case]["experts"]["steps"], alone["steps"], strict=True):
        assert ours == pytest.approx(expected, rel=16 * EPS)


@pytest.mark.subprocess
def test_weights_in_bfloat16_and_adapters_in_fp32(several, tmp_path):
    """The processes compute the batches of one process, with its bits; only sums are taken in another order."""
    expected = two_rounds(odd_llama(torch.bfloat16), tmp_path)
    for result in several[2]:
        assert result["bfloat16"]["frozen"] and result["bfloat16"]["kinds"]
    steps = several[2][0]["bfloat16"]["steps"]
    assert steps[0]["loss"] == pytest.approx(expected["steps"][0]["loss"], rel=4 * EPS)
    for ours, theirs in zip(steps, expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=torch.finfo(torch.bfloat16).eps)


@pytest.mark.subprocess
@pytest.mark.parametrize("case", ["ddp goes on", "fsdp goes on", None])
def test_a_round_goes_on_in_its_middle_with_the_same_bits(several, tmp_path, case):
    results = [going_on(lambda: odd_llama(dropout_p=0.3), tmp_path)] if case is None else [r[case] for r in several[2]]
    assert results[0]["lines"] == [2, 3]
    for found in results:
        assert found["steps"] == [3, 3]
        assert found["same lines"] and found["same values"]


@pytest.mark.subprocess
def test_failures_leave_the_last_whole_step(several):
    for found in (result["failures"] for result in several[2]):
        assert found["kept"] and found["goes on"] == 1
        assert "loss is nan in round 1, step 3 of 3" in found["not finite"]
        assert found["finite"] and found["moved"]
        assert found["own"] == pytest.approx(found["without"], rel=16 * EPS)
        assert "no trained parameters beside a sharded model's, got own" in found["own trained"]
        assert "holds the model, got Identity" in found["no model"]
    assert several[2][0]["failures"]["steps"] == [1]


def test_the_worker_takes_as_many_sequences_a_step_as_processes_do():
    assert training.STEP % 2 == training.STEP % 3 == 0 and training.SEQUENCES % training.STEP
