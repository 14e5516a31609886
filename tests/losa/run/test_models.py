"""Architectures of kinds that the families have not, through all of losa."""

from __future__ import annotations

import pytest

from tests.helpers.architectures import config_of, names
from tests.helpers.whole_models import COLUMNS, OK, check_model

# Keys and values that later blocks share; arguments of blocks that depend on the tokens; a tokenizer of its own;
# attention and recurrence in turn, with experts; blocks that share their weights.
HERE = ("gemma3n_shared", "gemma4_inputs", "qwen2", "qwen3_5_moe_text", "zamba2")
# The shared weights of zamba2 stay dense, and its blocks cannot be read by themselves.
REFUSED = {("zamba2", "block by block"): "refused: ", ("zamba2", "share"): "57.6%"}


@pytest.mark.parametrize("name", HERE)
def test_an_architecture_goes_through_all_of_losa(name, tmp_path):
    found = check_model(name, tmp_path)
    assert list(found) == list(COLUMNS)
    for column, outcome in found.items():
        if (name, column) in REFUSED:
            assert outcome.startswith(REFUSED[name, column]), column
        elif column == "share":
            assert float(outcome.rstrip("%")) >= 98, outcome
        elif column == "loop":
            assert outcome in ("losa's", "transformers")
        else:
            assert outcome == OK, f"{column}: {outcome}"


def test_every_name_is_of_a_configuration():
    """Of all causal models of the installed transformers, encoders and halves of others aside."""
    every = names()
    assert len(every) > 120 and {*HERE} <= {*every}
    for name in every:
        assert config_of(name).get_text_config() is not None
