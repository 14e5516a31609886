"""Resume states: everything comes back to the bit, and nothing comes back from the wrong or a damaged one."""

from __future__ import annotations

import errno
import json
import logging
import os
import random

import numpy as np
import pytest
import torch

from losa.errors import OutputError
from losa.model.wrapping import wrap_model, wrapped_linears
from losa.modules.lora import LoRALinear
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.reading import parse_recipe
from losa.run import resume
from losa.run.resume import load_resume_state, save_resume_state
from tests.helpers.tiny import tiny_llama

PARTS = ("weight", "mask", "lora_A", "lora_B")


def recipe(**changes):
    settings = {
        "model": "tiny",
        "output": "out",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "text.txt"},
        "train": {"data": "text.txt"},
    }
    return parse_recipe(settings | changes)


def wrapped(layer=MaskedLoRALinear, **settings):
    model = tiny_llama(layers=2, **settings)
    wrap_model(model, layer=layer, rank=2, scaling=2.0)
    return model


def train(model, seed=0):
    """Give every layer what a round would: mask, another rank, values, and some a replaced weight."""
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(wrapped_linears(model).values()):
        layer.set_rank(1 + index % 5)
        if index % 3 == 0:
            layer.replace_weight(torch.randn(layer.weight.shape, generator=generator))
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.5)
        with torch.no_grad():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return model


def state_of(model):
    return {(n, part): getattr(m, part).detach().clone() for n, m in wrapped_linears(model).items() for part in PARTS}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("layer", [MaskedLoRALinear, LoRALinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back_to_the_bit(tmp_path, layer, dtype):
    def make():
        model = tiny_llama(layers=2).to(dtype)
        wrap_model(model, layer=layer, rank=2, scaling=2.0)
        return model

    model = train(make())
    ids = torch.randint(0, 90, (1, 16))
    for source in (torch.manual_seed, np.random.seed, random.seed):
        source(7)
    random.gauss(0, 1), np.random.standard_normal()  # leaves half a pair behind
    state = {"rounds": [{"perplexity": 0.1 + 0.2}], "global_step": 3}
    save_resume_state(tmp_path, model, recipe=recipe(), completed_round=1, state=state)
    drawn = torch.rand(3), np.random.standard_normal(3), [random.gauss(0, 1) for _ in range(3)]

    again = make()
    assert load_resume_state(tmp_path, again, recipe(output="elsewhere")) == state
    fresh = torch.rand(3), np.random.standard_normal(3), [random.gauss(0, 1) for _ in range(3)]
    assert torch.equal(fresh[0], drawn[0]) and np.array_equal(fresh[1], drawn[1]) and fresh[2] == drawn[2]
    assert same(state_of(again), state_of(model))
    before, after = wrapped_linears(model).values(), wrapped_linears(again).values()
    assert [m.weight_replaced for m in after] == [m.weight_replaced for m in before]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_only_replaced_weights_are_stored(tmp_path):
    model = train(wrapped())
    save_resume_state(tmp_path, model, recipe=recipe(), completed_round=1, state={})
    stored = resume.load_file(tmp_path / "round-01" / "layers.safetensors")
    weights = {key.removesuffix(".weight") for key in stored if key.endswith(".weight")}
    assert weights == {name for name, layer in wrapped_linears(model).items() if layer.weight_replaced}
    assert 0 < len(weights) < len(wrapped_linears(model))
    files = {path.suffix for path in (tmp_path / "round-01").iterdir()}
    assert files == {".safetensors", ".json"}


def test_restored_weights_do_not_depend_on_the_file(tmp_path):
    """A tensor of a mapped file would lie at an odd address and round differently."""
    save_resume_state(tmp_path, train(wrapped()), recipe=recipe(), completed_round=1, state={})
    model = wrapped()
    load_resume_state(tmp_path, model, recipe())
    replaced = [m for m in wrapped_linears(model).values() if m.weight_replaced]
    assert replaced and all(m.weight.data_ptr() % 64 == 0 for m in replaced)


def test_newest_two_are_kept_in_the_order_of_numbers(tmp_path):
    model = wrapped()
    for number in (8, 9, 99, 100):
        save_resume_state(tmp_path, model, recipe=recipe(), completed_round=number, state={"number": number})
    assert names(tmp_path) == ["round-100", "round-99"]
    assert load_resume_state(tmp_path, wrapped(), recipe()) == {"number": 100}
    save_resume_state(tmp_path, model, recipe=recipe(), completed_round=100, state={"number": "again"})
    assert load_resume_state(tmp_path, wrapped(), recipe()) == {"number": "again"}


def test_nothing_to_load(tmp_path):
    assert load_resume_state(tmp_path / "absent", wrapped(), recipe()) is None
    (tmp_path / ".round-01.partial-1").mkdir()
    (tmp_path / "round-one").mkdir()
    assert load_resume_state(tmp_path, wrapped(), recipe()) is None


def test_another_recipe_is_named(tmp_path):
    save_resume_state(tmp_path, wrapped(), recipe=recipe(), completed_round=1, state={})
    model = wrapped()
    before = state_of(model)
    with pytest.raises(OutputError) as caught:
        load_resume_state(tmp_path, model, recipe(prune={"sparsity": 0.6}, seed=3))
    message = str(caught.value)
    assert "round-01" in message and "prune.sparsity was 0.5, is 0.6" in message and "seed was 0, is 3" in message
    assert message.count(" was 0") == 2
    assert same(state_of(model), before)


@pytest.mark.parametrize(
    "settings, message",
    [({"layers": 3}, "the checkpoint lacks model.layers.2"), ({"layers": 1}, "the model lacks model.layers.1")],
)
def test_another_model_is_refused(tmp_path, settings, message):
    save_resume_state(tmp_path, wrapped(), recipe=recipe(), completed_round=1, state={})
    model = tiny_llama(**settings)
    wrap_model(model, rank=2, scaling=2.0)
    with pytest.raises(OutputError, match=f"another model; {message}"):
        load_resume_state(tmp_path, model, recipe())


def test_other_shapes_are_refused(tmp_path):
    save_resume_state(tmp_path, train(wrapped()), recipe=recipe(), completed_round=1, state={})
    model = wrapped(hidden=64)
    before = state_of(model)
    with pytest.raises(OutputError, match=r"another model; model.layers.0.*expected \(64, 8\), found \(32, 4\)"):
        load_resume_state(tmp_path, model, recipe())
    assert same(state_of(model), before)


def cut(path):
    file = path / "layers.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_bit(path):
    data = bytearray((path / "layers.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "layers.safetensors").write_bytes(data)


def cut_json(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-20])


def remove(path):
    (path / "state.json").unlink()


@pytest.mark.parametrize("damage", [cut, flip_bit, cut_json, remove], ids=lambda d: d.__name__)
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, damage):
    first = train(wrapped(), seed=1)
    for number, model in ((1, first), (2, train(wrapped(), seed=2))):
        save_resume_state(tmp_path, model, recipe=recipe(), completed_round=number, state={"number": number})
    damage(tmp_path / "round-02")
    again = wrapped()
    with caplog.at_level(logging.WARNING, logger="losa"):
        assert load_resume_state(tmp_path, again, recipe()) == {"number": 1}
    assert "round-02: damaged" in caplog.text
    assert same(state_of(again), state_of(first))
    damage(tmp_path / "round-01")
    with pytest.raises(OutputError, match="round-02: damaged"):
        load_resume_state(tmp_path, wrapped(), recipe())


def no_space():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "raised, expected, message",
    [(no_space(), OutputError, "No space left"), (KeyboardInterrupt(), KeyboardInterrupt, None)],
)
def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch, raised, expected, message):
    save_resume_state(tmp_path, wrapped(), recipe=recipe(), completed_round=1, state={"number": 1})
    write = resume.save_file

    def fails(tensors, path):
        write(tensors, path)
        raise raised

    monkeypatch.setattr(resume, "save_file", fails)
    for number in (1, 2):
        with pytest.raises(expected, match=message):
            save_resume_state(tmp_path, wrapped(), recipe=recipe(), completed_round=number, state={})
    assert names(tmp_path) == ["round-01"]
    assert load_resume_state(tmp_path, wrapped(), recipe()) == {"number": 1}


def test_the_document_is_plain_json(tmp_path):
    save_resume_state(tmp_path, wrapped(), recipe=recipe(), completed_round=4, state={"a": 1})
    document = json.loads((tmp_path / "round-04" / "state.json").read_text())
    assert document["completed_round"] == 4 and document["state"] == {"a": 1}
    assert document["recipe"]["prune"]["sparsity"] == 0.5 and "output" not in document["recipe"]
