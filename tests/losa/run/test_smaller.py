"""Runs of a structured pruner: a smaller model, and everything that is said of it."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from losa.algorithm.engine import Engine
from losa.errors import ModelError, RecipeError
from losa.inference.decoding import LeanDecoder
from losa.output import export
from losa.output.inspection import inspect_directory
from losa.output.tables import plain_text, zeros_table
from losa.packed.directory import pack_directory
from losa.recipe.reading import parse_recipe
from losa.run.estimate import estimate
from losa.run.pipeline import run_recipe
from tests.helpers.families import family
from tests.helpers.runs import settings
from tests.helpers.tiny import tiny_tokenizer

PRUNE = {"prune": {"sparsity": 0.5, "pruner": "wanda_sp"}}
UNIFORM = {"allocation": {"mean_rank": 2, "rank_max": 6, "rates": "uniform"}}


def test_a_run_leaves_a_smaller_model(workspace, tmp_path, monkeypatch):
    """Interrupted after its first round, too."""
    short = settings(workspace, output := tmp_path / "out", **PRUNE, **UNIFORM, evaluate=None)
    short["train"] |= {"max_tokens": 32 * 4}
    recipe = parse_recipe(short)
    monkeypatch.setattr(export, "write_figures", lambda *_: [])  # pictures take most of the time
    run_round = Engine.run_round

    def interrupted(self, plan):
        if plan.index == 2:
            raise KeyboardInterrupt
        return run_round(self, plan)

    monkeypatch.setattr(Engine, "run_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    monkeypatch.setattr(Engine, "run_round", run_round)
    record = run_recipe(recipe, resume=True)
    result, total = record.results[-1], 3 * 32 * (2 * 8 * (4 + 2) + 3 * 64)
    assert (result.zeros, result.prunable, result.sparsity) == (total // 2, total, 0.5)
    assert record.shrunk is not None and record.shrunk.removed == total // 2
    assert all(mask.kept == mask.shape[0] * mask.shape[1] for mask in record.masks.values())
    config = json.loads((output / "config.json").read_text())
    assert [config[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")] == [2, 1, 32]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert sum(p.numel() for n, p in model.named_parameters() if "proj" in n) == total // 2
    assert LeanDecoder(model, 8).query_heads == 2, "losa's own loop serves it"

    found = inspect_directory(output)
    assert found.record == record and not found.lost_zeros and found.sparsity == 0
    gone = f"{total // 2:,} of {total:,} weights are gone with whole heads and channels (50.00 %)"
    assert gone in plain_text(zeros_table(found))
    card = (output / "README.md").read_text()
    assert f"{gone}: `num_attention_heads` 4 -> 2, `num_key_value_heads` 2 -> 1, `intermediate_size` 64 -> 32." in card
    assert "50 % of the blocks removed" in card and "exact zeros" not in card and "as large as" not in card
    assert f"{total // 2:,} ({total // 2:,} removed)" in card
    with pytest.raises(ModelError, match="none of 21 linears has 20% zeros"):
        pack_directory(output, tmp_path / "packed")


def test_what_it_cannot_do_is_said_before_any_work(workspace, tmp_path):
    cka = parse_recipe(settings(workspace, tmp_path / "out", **PRUNE))
    for function in (run_recipe, estimate):
        with pytest.raises(RecipeError, match="allocation.rates: expected uniform, got 'cka'"):
            function(cka)
    linear = UNIFORM["allocation"] | {"per": "linear"}
    for function in (run_recipe, estimate):
        with pytest.raises(RecipeError, match="allocation.per: linear: expected a pruner of single linears"):
            function(parse_recipe(settings(workspace, tmp_path / "out", **PRUNE, allocation=linear)))
    # Methods without rounds of their own rates do not read them.
    parse_recipe(settings(workspace, tmp_path / "out", method="prune_only", **PRUNE))
    family("OPT").save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    other = parse_recipe(settings(workspace, tmp_path / "out", **PRUNE, **UNIFORM) | {"model": str(tmp_path / "opt")})
    for function in (run_recipe, estimate):
        with pytest.raises(ModelError, match="from a model of type 'opt': expected q_proj"):
            function(other)
    assert not list(tmp_path.glob("out*"))
