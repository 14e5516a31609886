"""Every architecture of the installed transformers through all of losa: what comes of it is what models.json says.

make test-models                              all of them; a quarter of an hour
python -m tests.helpers.model_table --write   record what comes of them now
"""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from losa.model.blocks import find_blocks, weight_count
from losa.model.wrapping import matrix_weights, unprunable_of
from tests.helpers.architectures import names
from tests.helpers.model_table import PAGE, TABLE, filled, read_table
from tests.helpers.whole_models import COLUMNS, check_model

RECORDED = read_table()
same_version = pytest.mark.skipif(
    transformers.__version__ != RECORDED["transformers"],
    reason=f"{TABLE.name} is of transformers {RECORDED['transformers']}, this is {transformers.__version__}",
)


@same_version
def test_every_architecture_has_a_row_and_none_a_fault():
    """A refusal gives a sentence, and a step has no result only behind one that was refused."""
    models = RECORDED["models"]
    assert sorted(models) == names()
    for name, outcomes in models.items():
        assert tuple(outcomes) == COLUMNS, name
        for column, outcome in outcomes.items():
            assert not outcome.startswith("FAULT"), (name, column, outcome)
            assert outcome != "refused: ", (name, column)
        if "-" in outcomes.values():
            assert any(outcome.startswith("refused: ") for outcome in outcomes.values()), name


@same_version
def test_the_page_shows_what_is_recorded():
    assert filled(PAGE.read_text(), RECORDED) == PAGE.read_text()


# What most people use: every step, and at least 99 % of the weights in the matrices of blocks. At the width of these
# models the linears that Jamba reads itself are 2 % of them.
OURS, THEIRS = (
    "llama mistral_full mixtral qwen2 qwen3 qwen3_moe",
    "deepseek_v3 falcon gemma3_text gemma3n_text gpt2 gpt_oss",
)
LOOPS = dict.fromkeys(OURS.split(), "losa's") | dict.fromkeys(THEIRS.split(), "transformers")
LOOPS |= dict.fromkeys(("jamba", "llama4_text", "mistral3", "olmoe", "phi3", "qwen3_vl"), "transformers")


@same_version
@pytest.mark.parametrize("name", LOOPS)
def test_what_most_people_use_is_pruned_whole(name):
    outcomes = dict(RECORDED["models"][name])
    share, _, dense = outcomes.pop("share").partition("%")
    assert float(share) >= (97.5 if name == "jamba" else 99)
    assert dense == (
        "; dense: mamba.A_log, mamba.conv1d, mamba.dt_proj, feed_forward.router" if name == "jamba" else ""
    )
    assert outcomes.pop("loop") == LOOPS[name]
    assert set(outcomes.values()) == {"ok"}, outcomes


@same_version
@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v3", "falcon", "gemma3n_text", "gpt2", "gpt_oss", "jamba", "llama4_text", "mixtral", "olmoe"),
        "qwen3_moe",
    ],
)
def test_at_the_size_that_people_use_next_to_nothing_stays_dense(name):
    """Of the configuration that transformers has by default: 7 to 670 billion weights, but for GPT-2."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](), dtype=torch.bfloat16)
    # A model without numbers cannot be asked which linears it reads itself: the small one was.
    dense = RECORDED["models"][name]["share"].partition("; dense: ")[2].split(", ")
    linears = find_blocks(model).linears().items()
    read = [m for full, m in linears if any(own and full.endswith(f".{own}") for own in dense)]
    left = unprunable_of(model) + sum(map(weight_count, read))
    assert left <= 0.002 * matrix_weights(model)
    assert bool(read) == (name == "jamba")


@same_version
@pytest.mark.models
@pytest.mark.parametrize("name", names())
def test_what_is_recorded_comes_of_it(name, tmp_path):
    assert check_model(name, tmp_path) == RECORDED["models"][name]
