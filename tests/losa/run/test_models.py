"""Architectures of kinds that the families have not, through all of losa."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from tests.helpers.architectures import config_of, names
from tests.helpers.exports import tensors_of
from tests.helpers.model_table import read_table
from tests.helpers.whole_models import COLUMNS, OK, Model, check_model

# What most people use, with experts in each form; keys and values that later blocks share; arguments of blocks that
# depend on the tokens; a tokenizer of its own; attention and recurrence in turn; blocks that share their weights.
HERE = (
    *("deepseek_v3", "falcon", "gemma3n_shared", "gemma4_inputs", "gpt2", "gpt_oss", "jamba", "llama4_text", "mixtral"),
    *("qwen2", "qwen3_5_moe_text", "zamba2"),
)
# The shared weights of zamba2 stay dense, and its blocks cannot be read by themselves.
REFUSED = {("zamba2", "block by block"): "refused: ", ("zamba2", "share"): "57.6%"}


@pytest.mark.parametrize("name", HERE)
def test_an_architecture_goes_through_all_of_losa(name, tmp_path):
    found = check_model(name, tmp_path)
    recorded = read_table()
    if recorded["transformers"] == transformers.__version__:
        assert found == recorded["models"][name]
    assert list(found) == list(COLUMNS)
    for column, outcome in found.items():
        if (name, column) in REFUSED:
            assert outcome.startswith(REFUSED[name, column]), column
        elif column == "share":
            assert float(outcome.partition("%")[0]) >= (97.5 if name == "jamba" else 98), outcome
        elif column == "loop":
            assert outcome in ("losa's", "transformers")
        else:
            assert outcome == OK, f"{column}: {outcome}"


def test_a_model_of_two_modalities_keeps_its_other_half(tmp_path):
    """Its text half is pruned; the blocks that read images, and the files that say how, stay as they are."""
    name = "mistral3"
    found = check_model(name, tmp_path)
    assert {found[column] for column in COLUMNS[:2] + COLUMNS[3:7]} == {OK} and found["share"] == "100.0%"
    given = {"image_processor_type": "PixtralImageProcessor"}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(given))
    model = Model(name, tmp_path)
    record = model.run("again")
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text()) == given
    assert all(mask.startswith("model.language_model.layers.") for mask in record.masks)
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "again")
    images = [each for each in before if "vision" in each or "projector" in each]
    assert len(images) > 20 and all(torch.equal(before[each], after[each]) for each in images)


def test_every_name_is_of_a_configuration():
    """Of all causal models of the installed transformers, encoders and halves of others aside."""
    every = names()
    assert len(every) > 120 and {*HERE} <= {*every}
    for name in every:
        assert config_of(name).get_text_config() is not None
