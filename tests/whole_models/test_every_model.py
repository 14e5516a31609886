"""Every architecture of the installed transformers through all of losa: what comes of it is what models.json says.

make test-models                              all of them; a quarter of an hour
python -m tests.helpers.model_table --write   record what comes of them now
"""

from __future__ import annotations

import pytest
import transformers

from tests.helpers.architectures import names
from tests.helpers.model_table import TABLE, read_table
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
    assert float(outcomes.pop("share").rstrip("%")) >= (97.5 if name == "jamba" else 99)
    assert outcomes.pop("loop") == LOOPS[name]
    assert set(outcomes.values()) == {"ok"}, outcomes


@same_version
@pytest.mark.models
@pytest.mark.parametrize("name", names())
def test_what_is_recorded_comes_of_it(name, tmp_path):
    assert check_model(name, tmp_path) == RECORDED["models"][name]
