"""Mixed N:M from a recipe to generated text: blocks that keep different counts, packed each in its own pattern."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from losa.inference.generation import generate
from losa.model.blocks import block_linears
from losa.modules.sparse import SparseLinear
from losa.packed.directory import load, pack_directory
from losa.recipe.reading import parse_recipe
from losa.run.pipeline import run_recipe
from losa_kernels.packing import PackedNM
from tests.helpers.recipes import settings
from tests.helpers.tiny import assert_same_function, logits

# The box is wide, so that three blocks differ: with the paper's, 32 of them are needed.
DELTA = 0.2


@pytest.mark.parametrize("pattern", ["2:8", "2:4"])
def test_from_recipe_to_text(workspace, tmp_path, pattern):
    keep_n, m = (int(part) for part in pattern.split(":"))
    recipe = settings(workspace, tmp_path / "merged", prune={"pattern": pattern, "mixed": True})
    recipe["allocation"] |= {"delta": DELTA}
    record = run_recipe(parse_recipe(recipe))

    saved = json.loads((tmp_path / "merged" / "losa_config.json").read_text())["rounds"][-1]
    counts = saved["keep_n"]
    assert saved["m"] == m and sum(counts) == keep_n * len(counts) and len(set(counts)) > 1
    assert record.results[-1].sparsity == pytest.approx(1 - keep_n / m, abs=1e-3)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for name, linear in block_linears(model).items():
        kept = (linear.weight != 0).reshape(-1, m).sum(1)
        assert int(kept.max()) == counts[int(name.split(".")[2])], name

    report = pack_directory(tmp_path / "merged", tmp_path / "packed")
    assert report.dense == 0 and report.packed_bytes < report.dense_bytes
    loaded, tokenizer = load(tmp_path / "packed")
    packed = {name: module.packed for name, module in loaded.named_modules() if isinstance(module, SparseLinear)}
    assert len(packed) == 7 * len(counts)
    for name, weight in packed.items():
        block = counts[int(name.split(".")[2])]
        assert isinstance(weight, PackedNM) and weight.keep_n / weight.m == block / m
        assert weight.values.shape[1] == weight.shape[1] // m * block
        assert torch.equal(weight.unpack(), model.get_submodule(name).weight)
    assert_same_function(logits(loaded), logits(model))
    texts = [generate(each, tokenizer, "The quick", max_new_tokens=40, stop_at_eos=False) for each in (model, loaded)]
    assert texts[0].tokens == texts[1].tokens
