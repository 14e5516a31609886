"""Positions and embeddings: what a model cannot take in is refused before it runs."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from losa.data.sequences import PackedData
from losa.errors import DataError, ModelError
from losa.evaluation.perplexity import perplexity
from losa.model.limits import Positions, check_ids, check_length, positions
from losa.recipe.reading import parse_recipe
from losa.run.inputs import check_inputs
from tests.helpers.tiny import tiny_llama

LIMIT = 21
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, **SPECIAL}
USUAL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60, **SPECIAL}


def gpt_neo():
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            hidden_size=16, num_layers=1, num_heads=2, vocab_size=60, attention_types=[[["local"], 1]],
            max_position_embeddings=LIMIT, **SPECIAL,
        )
    )  # fmt: skip


def xglm():
    sizes = {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 16, "vocab_size": 60, **SPECIAL}
    return XGLMForCausalLM(XGLMConfig(max_position_embeddings=LIMIT, **sizes))


def opt():
    sizes = USUAL | {"ffn_dim": 16, "word_embed_proj_dim": 16, "pad_token_id": 0}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=LIMIT, **sizes))


def mpt():
    return MptForCausalLM(MptConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=LIMIT, vocab_size=60, **SPECIAL))


def biogpt():
    return BioGptForCausalLM(BioGptConfig(max_position_embeddings=LIMIT, intermediate_size=16, **USUAL))


def roberta():
    sizes = USUAL | {"intermediate_size": 16, "pad_token_id": 0}
    return RobertaForCausalLM(RobertaConfig(max_position_embeddings=LIMIT + 1, is_decoder=True, **sizes))


TABLES = {
    "learned": lambda: GPT2LMHeadModel(GPT2Config(n_positions=LIMIT, **GPT)),
    "learned, begins late": opt,
    "learned and a mask": gpt_neo,
    "learned, another decoder": biogpt,
    "learned, counted from the padding": roberta,
    "sinusoids": lambda: CTRLLMHeadModel(CTRLConfig(n_positions=LIMIT, dff=16, **GPT)),
    "rotary, tabulated": lambda: GPTJForCausalLM(GPTJConfig(n_positions=LIMIT, rotary_dim=4, **GPT)),
    "bias": mpt,
}
OPEN = {
    "rotary": (lambda: tiny_llama(layers=1), 256),
    "sinusoids made anew": (xglm, LIMIT),
    "alibi": (
        lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=60, **SPECIAL)),
        None,
    ),
    "recurrent": (lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=60)), None),
}


def runs(model, length):
    try:
        with torch.no_grad():
            model(torch.ones(1, length, dtype=torch.int64) * 5, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_positions_end_where_the_model_fails(name):
    model = TABLES[name]().eval()
    assert positions(model) == Positions(LIMIT, True)
    assert runs(model, LIMIT) and not runs(model, LIMIT + 1)
    check_length(model, LIMIT, "calibration.length")
    with pytest.raises(ModelError, match=f"calibration.length: {LIMIT + 1} tokens are more than the {LIMIT} positions"):
        check_length(model, LIMIT + 1, "calibration.length")


@pytest.mark.parametrize("name", OPEN)
def test_other_positions_go_on(name, caplog):
    build, limit = OPEN[name]
    model = build().eval()
    assert positions(model) == Positions(limit, False)
    assert runs(model, (limit or LIMIT) + 1)
    with caplog.at_level(logging.WARNING, "losa"):
        for what in ("train.length", "evaluate.length"):
            check_length(model, 300, what)
    said = [record.getMessage() for record in caplog.records if record.name == "losa"]
    assert len(said) == (limit is not None), "one warning a model"
    assert all(f"train.length: 300 tokens are more than the {limit} positions" in line for line in said)


def test_positions_of_an_image_tower_are_not_the_texts():
    model = tiny_llama(layers=1)
    model.vision = nn.Embedding(256, 8)
    assert positions(model).table is False


def test_ids_without_an_embedding():
    model = tiny_llama(layers=1)
    rows = model.get_input_embeddings().num_embeddings
    check_ids(model, torch.tensor([[0, rows - 1]]), "train.data")
    check_ids(model, torch.zeros(0, 4, dtype=torch.int64), "train.data")
    with pytest.raises(ModelError, match=f"train.data: .* token {rows + 3}, but the model has {rows} embeddings"):
        check_ids(model, torch.tensor([[0, rows], [rows + 3, 1]]), "train.data")
    with pytest.raises(ModelError, match=f"evaluate.data: .* token {rows}"):
        perplexity(model, torch.tensor([1, 2, rows, 4]), 4)
    # The tail that no window reads does no harm.
    assert perplexity(model, torch.tensor([1, 2, 3, 4, rows]), 4).windows == 1
    with pytest.raises(ModelError, match=f"evaluate.length: .*{LIMIT} positions"):
        perplexity(opt(), torch.ones(60, dtype=torch.int64), LIMIT + 1)


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
        check_inputs(opt(), recipe(), IDS % 60, PackedData(IDS[:4, :11].reshape(2, 22) % 60, IDS), None)


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
