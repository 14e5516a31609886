"""Positions and embeddings: what a model cannot take in is refused before it runs."""

from __future__ import annotations

import logging

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

from losa.errors import ModelError
from losa.evaluation.perplexity import perplexity
from losa.model.limits import Positions, check_ids, check_length, positions
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
