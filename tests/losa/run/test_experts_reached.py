"""Which recipes train experts that a process may not reach."""

from __future__ import annotations

import pytest

from losa.model.blocks import expert_lists, find_blocks
from losa.modules.masked_lora import MaskedLoRALinear
from losa.run.pruning import experts_are_reached
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.planned_recipe import recipe
from tests.helpers.training import odd_llama


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({}, True),
        ({"compare": ["sparse_lora", "prune_only"]}, True),
        ({"method": "prune_only", "train": None}, True),
        ({"method": "lora"}, False),
        ({"compare": ["lora"]}, False),
        ({"lora": {"dropout": 0.1}}, False),
        ({"method": "lora", "prune": {"targets": ["q_proj"]}}, True),
        ({"method": "lora", "prune": {"targets": ["q_proj", "down_proj"]}}, False),
        ({"prune": {"targets": ["down_proj"]}}, True),
    ],
)
def test_of_a_stack(changes, reached):
    assert experts_are_reached(recipe("model", **changes), find_blocks(of_kind(KINDS["Mixtral"]))) is reached


def test_of_modules():
    blocks = find_blocks(odd_llama(experts=True))
    (experts, *_) = (experts for block in blocks for experts in expert_lists(block))
    names = {
        name.rpartition(".")[2] for name, module in experts.named_modules() if isinstance(module, MaskedLoRALinear)
    }
    assert not experts_are_reached(recipe("model"), blocks)
    assert experts_are_reached(recipe("model", prune={"targets": ["q_proj"]}), blocks)
    assert names and not experts_are_reached(recipe("model", prune={"targets": [*names]}), blocks)
