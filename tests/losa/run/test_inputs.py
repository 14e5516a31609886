"""Whether the texts of a recipe suit its model."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from losa.data.sequences import PackedData
from losa.errors import DataError, ModelError
from losa.recipe.reading import parse_recipe
from losa.run.inputs import check_inputs
from tests.helpers.tiny import tiny_llama


def recipe(**changes):
    settings = {
        "model": "m", "output": "o", "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt", "samples": 4, "length": 16},
        "train": {"data": "t.txt", "length": 16, "batch_size": 2},
        "evaluate": {"data": "e.txt", "length": 16},
    }  # fmt: skip
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_recipe(settings)


IDS = torch.arange(6 * 16).reshape(6, 16) % 90


def few_positions():
    sizes = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "vocab_size": 90}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=21, num_attention_heads=2, **sizes))


def test_what_a_run_feeds_is_checked_at_once(caplog):
    model = tiny_llama(layers=1)
    data = PackedData(IDS, IDS)
    with caplog.at_level(logging.WARNING, "losa"):
        check_inputs(model, recipe(), IDS[:4], data, IDS[:3])
        check_inputs(model, recipe(), IDS[:4], None, None)
    assert not caplog.records
    far = IDS.clone()
    far[5, 15] = 200
    for section, inputs in {
        "calibration": (far, data, IDS), "train": (IDS, PackedData(far, far), IDS), "evaluate": (IDS, data, far)
    }.items():  # fmt: skip
        with pytest.raises(ModelError, match=f"{section}.data: .*token 200"):
            check_inputs(model, recipe(), *inputs)
    with pytest.raises(ModelError, match=r"train.length: 22 tokens"):
        check_inputs(few_positions(), recipe(), IDS, PackedData(IDS[:4, :11].reshape(2, 22), IDS), None)


def test_samples_that_are_all_the_same_cannot_be_compared():
    model, same = tiny_llama(layers=1), IDS[:1].expand(4, 16)
    with pytest.raises(DataError, match=r"all 4 samples are the same text.*'cka'"):
        check_inputs(model, recipe(), same, None, None)
    check_inputs(model, recipe(allocation={"rates": "uniform"}), same, None, None)
    check_inputs(model, recipe(method="sparse_lora"), same, None, None)
    with pytest.raises(DataError, match="all 2 samples"):
        check_inputs(model, recipe(calibration={"cka_samples": 2}), IDS[[0, 0, 1, 2]], None, None)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"calibration": {"cka_samples": 9}}, "calibration.cka_samples: 9, but there are 4 samples"),
        ({"calibration": {"batch_size": 8}}, "calibration.batch_size: 8, but there are 4 samples"),
        ({"train": {"batch_size": 7}}, "train.batch_size: 7 x gradient_accumulation 1 are 7 .* there are 6"),
        ({"train": {"gradient_accumulation": 4}}, "train.batch_size: 2 x gradient_accumulation 4 are 8"),
        ({"rounds": {"count": 8}}, "rounds.count: 8, but there are 6 sequences; the first 2 train on none"),
        ({"train": {"round_share": 0.5}}, "train.round_share: 5 rounds of 0.5 are more .* each gets 1/5"),
        ({"evaluate": {"max_windows": 5}}, "evaluate.max_windows: 5, but the text has 3"),
    ],
)
def test_sizes_beyond_the_data_are_said(changes, said, caplog):
    with caplog.at_level(logging.WARNING, "losa"):
        check_inputs(tiny_llama(layers=1), recipe(**changes), IDS[:4], PackedData(IDS, IDS), IDS[:3])
    assert len(caplog.records) == 1
    assert re.search(said, caplog.text)


def test_processes_without_samples_are_said(monkeypatch, caplog):
    monkeypatch.setattr("losa.run.inputs.process_count", lambda: 4)
    with caplog.at_level(logging.WARNING, "losa"):
        check_inputs(tiny_llama(layers=1), recipe(), IDS[:4], None, None)
        assert not caplog.records
        check_inputs(tiny_llama(layers=1), recipe(calibration={"batch_size": 3}), IDS[:4], None, None)
    assert "batch_size: 3 makes 2 batches of 4 samples; 2 of 4 processes have none to run" in caplog.text
