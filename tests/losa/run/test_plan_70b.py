"""The plan's shards against real ones: LLaMA-2-70B on the meta device among 64 and 8 made-up processes, and a tiny
model whose rows do not divide evenly."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from losa.distributed.sharding import make_sharding, shard_module
from losa.model.blocks import find_blocks
from losa.model.loading import configured_model
from losa.model.wrapping import wrap_model
from losa.recipe.reading import override, parse_recipe, read_settings
from losa.run.cluster import Cluster
from losa.run.estimate_cluster import ClusterEstimate, estimate_cluster
from losa.training.shell import make_shell
from tests.helpers.llama import RECIPE, configuration
from tests.helpers.tiny import tiny_llama

KINDS = {"weights": ("weight", "bias"), "masks": ("mask",), "adapters": ("lora_A", "lora_B")}
RANK = 10  # the mean rank of the last round: 6, and 1 more in each of 4 rounds


@contextmanager
def process(index, processes):
    """One of so many processes; what they would send goes nowhere."""
    dist.init_process_group("fake", rank=index, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def held(model: nn.Module) -> dict[str, int]:
    """Bytes of this process's rows, by kind; of the trained ones also a gradient and AdamW's two moments."""
    found = dict.fromkeys([*KINDS, "gradients", "optimiser"], 0)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        rows = parameter.to_local().detach()
        kind = next((kind for kind, ends in KINDS.items() if name.rpartition(".")[2] in ends), None)
        assert kind is not None, name
        found[kind] += rows.nbytes
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter)
            found["gradients"] += gradient.to_local().nbytes
            found["optimiser"] += 2 * gradient.to_local().nbytes
    return found


def planned(estimate: ClusterEstimate) -> dict[str, int]:
    phases = {"gradients": "training", "optimiser": "training"}
    return {what: estimate.size(phases.get(what, "throughout"), what) for what in (*KINDS, *phases)}


def dealt(model: nn.Module, index: int, processes: int, shard_size: int | None = None) -> dict[str, int]:
    with process(index, processes):
        mine = copy.deepcopy(model)
        shard_module(mine, make_sharding(torch.device("cpu"), shard_size))
        return held(mine)


@pytest.fixture(scope="module")
def recipe_70b(tmp_path_factory):
    settings = read_settings(RECIPE)
    return parse_recipe(override(settings, {"model": str(configuration(tmp_path_factory.mktemp("llama-2-70b")))}))


@pytest.fixture(scope="module")
def model_70b(recipe_70b):
    model = configured_model(recipe_70b.model, dtype="bfloat16")
    wrap_model(model, rank=RANK, scaling=2.0)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize(
    "processes, index, settings",
    [
        (64, 0, {}),
        (64, 63, {}),
        (8, 5, {}),
        (64, 9, {"mode": "hsdp", "shard_size": 8}),
    ],
)
def test_shards_of_70b_are_those_of_the_plan(recipe_70b, model_70b, processes, index, settings):
    distributed = recipe_70b.distributed.model_copy(update=settings)
    estimate = estimate_cluster(recipe_70b.model_copy(update={"distributed": distributed}), Cluster(processes))
    assert estimate.placement.mode == distributed.mode
    found, plan = dealt(model_70b, index, processes, estimate.placement.shard_size), planned(estimate)
    assert all(found[kind] <= plan[kind] for kind in plan), "the plan is of the process that holds most"
    assert sum(found.values()) >= 0.95 * sum(plan.values())
    if index % (estimate.placement.shard_size or 1) == 0:
        assert found == plan
    # LLaMA-2-70B's parameters, counted by hand.
    block = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    outside = 2 * 32000 * 8192 + (2 * 80 + 1) * 8192
    shards = estimate.placement.shard_size
    assert found["weights"] == 2 * (80 * block + outside) // shards
    assert found["masks"] == 80 * block // 8 // shards


class Holder(nn.Module):
    """Stands for a loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("processes, index", [(64, 0), (64, 9), (8, 7)])
def test_fsdp2_deals_out_the_same_rows(recipe_70b, tmp_path, processes, index):
    """Two of the 80 blocks: FSDP2's own shards, and the shell that a round trains."""
    configuration = json.loads((Path(recipe_70b.model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(configuration | {"num_hidden_layers": 2}))
    model = configured_model(str(tmp_path), dtype="bfloat16")
    wrap_model(model, rank=RANK, scaling=2.0)
    with process(index, processes):
        mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
        sharding = make_sharding(torch.device("cpu"))
        shard_module(mine, sharding)
        for module in (*find_blocks(theirs), theirs):
            fully_shard(module, mesh=sharding.mesh)
        assert held(mine) == held(theirs)
        shell, inner = make_shell(Holder(mine), mine)
        assert shell is not inner
        assert all(a is b for a, b in zip(inner.parameters(), mine.parameters(), strict=True))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_the_fullest_process_of_a_tiny_model_holds_what_is_planned(tmp_path, processes):
    """98 words and 16 to 64 rows among 3 and 5 processes: some have fewer rows, of an adapter's A none."""
    model = tiny_llama(layers=2)
    model.config.save_pretrained(tmp_path)
    wrap_model(model, rank=2, scaling=2.0)
    settings = {
        "model": str(tmp_path),
        "output": "out",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt"},
        "train": {"data": "t.txt"},
        "allocation": {"mean_rank": 2, "rank_growth": 0},
        "distributed": {"mode": "fsdp"},
    }
    estimate = estimate_cluster(parse_recipe(settings), Cluster(processes))
    every = [dealt(model, index, processes) for index in range(processes)]
    assert {kind: max(found[kind] for found in every) for kind in every[0]} == planned(estimate)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(found[kind] for found in every for kind in KINDS) == whole, "each row is held once"
