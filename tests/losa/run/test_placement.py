"""How a run decides where its model is held."""

from __future__ import annotations

import pytest
import torch

from losa.distributed.joining import Place
from losa.errors import RecipeError
from losa.recipe.machines import DistributedConfig
from losa.recipe.reading import parse_recipe
from losa.run import choice
from losa.run.choice import placement_of
from losa.run.placement import Placement, check_shards, choose
from tests.helpers.tiny import tiny_llama


@pytest.mark.parametrize(
    "settings, processes, fits, expected",
    [
        ({}, 1, False, Placement(1)),
        ({"mode": "fsdp"}, 1, True, Placement(1)),
        ({"cpu_offload": True}, 1, True, Placement(1, 1, offload=True)),
        ({}, 8, True, Placement(8)),
        ({}, 8, False, Placement(8, 8)),
        ({"cpu_offload": True}, 8, True, Placement(8, 8, offload=True)),
        ({"mode": "ddp"}, 8, None, Placement(8)),
        ({"mode": "fsdp"}, 8, None, Placement(8, 8)),
        ({"mode": "hsdp"}, 8, None, Placement(8, 4)),
        ({"mode": "hsdp", "shard_size": 2}, 8, None, Placement(8, 2)),
    ],
)
def test_what_a_recipe_asks_for(settings, processes, fits, expected):
    """On machines with 4 processes. Only mode auto asks what fits."""

    def asked(placement):
        assert fits is not None and placement == Placement(processes)
        return fits

    assert choose(DistributedConfig(**settings), processes, 4, asked) == expected


def test_gradients_take_whole_models():
    def asked(**settings):
        config = DistributedConfig(**settings)
        return choose(config, 8, 4, lambda placement: pytest.fail("nothing to choose"), "prune.pruner: pruner_zero")

    assert asked() == asked(mode="ddp") == Placement(8)
    for settings, found in (
        ({"mode": "fsdp"}, "fsdp"),
        ({"mode": "hsdp"}, "hsdp"),
        ({"cpu_offload": True}, "cpu_offl"),
    ):
        with pytest.raises(RecipeError, match=f"^prune.pruner: pruner_zero takes gradients .* ddp, got {found}"):
            asked(**settings)


def test_machines_of_a_size_that_does_not_divide_the_processes():
    with pytest.raises(RecipeError, match="distributed.shard_size: expected a divisor of 6 processes, got 4"):
        choose(DistributedConfig(mode="hsdp"), 6, 4, lambda placement: True)


def test_methods_that_need_whole_parameters():
    text = {"data": "text.txt"}
    settings = {"model": "m", "output": "out", "prune": {"sparsity": 0.5}, "calibration": text, "train": text}
    needy = parse_recipe(settings | {"compare": ["adalora", "lora"]})
    check_shards(needy, Placement(2))
    check_shards(parse_recipe(settings | {"compare": ["sora", "sparse_full"]}), Placement(2, 2))
    with pytest.raises(RecipeError, match="method: 'adalora' .* expected distributed.mode ddp, got fsdp"):
        check_shards(needy, Placement(2, 2))


def test_modes_and_copies():
    assert [Placement(*each).mode for each in ((1,), (4,), (4, 4), (4, 2), (1, 1, True))] == [
        "whole",
        "ddp",
        "fsdp",
        "hsdp",
        "fsdp",
    ]
    assert Placement(4, 2).text == "2 hold one model together, 2 times"
    assert Placement(4, 4, True).text == "all hold one model together, rows in host memory"
    assert [Placement(*each).copies for each in ((4,), (4, 4), (4, 2))] == [4, 1, 2]
    assert Placement(4).sharding(torch.device("cpu")) is None


@pytest.fixture
def recipe(tmp_path):
    tiny_llama(layers=2).config.save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "output": "out", "prune": {"sparsity": 0.5}, "calibration": {"data": "c.txt"}}
    return parse_recipe(settings | {"train": {"data": "t.txt"}})


def test_a_model_that_fits_is_whole_in_every_process(two_processes, recipe, monkeypatch, caplog):
    monkeypatch.setattr(choice, "capacity", lambda device: {"host": 10**12})
    assert placement_of(recipe, "cpu") == Placement(2)
    assert not caplog.text
    # The machine's memory is for all of its processes.
    monkeypatch.setattr(choice, "launched", lambda: Place(0, 2, 0, 10**6, "a", 1))
    assert placement_of(recipe, "cpu") == Placement(2, 2)
    assert "auto takes fsdp, but by an estimate the run needs more memory than there is" in caplog.text
    monkeypatch.setattr(choice, "capacity", lambda device: {})
    assert placement_of(recipe, "cpu") == Placement(2), "nothing is known"


def test_a_model_that_every_process_loads_into_its_machine_must_fit_there_too(two_processes, recipe, monkeypatch):
    monkeypatch.setattr(choice, "capacity", lambda device: {"device": 10**12, "host": 0})
    assert placement_of(recipe, "cuda") == Placement(2, 2)


def test_a_launch_that_asks_for_fsdp_gets_it(two_processes, recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(choice, "planned_model", lambda recipe: pytest.fail("there is nothing to choose"))
    assert placement_of(recipe, "cpu") == Placement(2, 2)


def test_the_sharding_of_a_placement(two_processes):
    sharding = Placement(2, 2, offload=True).sharding(torch.device("cpu"))
    assert sharding is not None and sharding.offload and sharding.mesh.shape == (2,)
    assert Placement(2, 1).sharding(torch.device("cpu")).mesh.shape == (2, 1)
