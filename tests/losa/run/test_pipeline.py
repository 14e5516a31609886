"""Whole runs on a tiny local model: every method, export, resume, failure."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from losa.algorithm.stream import BlockStream
from losa.data.tokens import calibration_tokens
from losa.errors import LosaError, NumericsError, OutputError
from losa.model.blocks import block_linears
from losa.model.wrapping import wrapped_linears
from losa.recipe.reading import parse_recipe
from losa.run import methods
from losa.run.inputs import Inputs
from losa.run.methods import MethodRun
from losa.run.pipeline import run_recipe
from tests.helpers.runs import settings
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

METHODS = ["losa", "lora", "sparse_lora", "prune_only", "finetune_then_prune", "sparse_full", "sora"]


@pytest.fixture
def held_after_merging(monkeypatch) -> list[int]:
    """How many of the dense linears and of the wrapped layers are still in memory after each merge."""
    dense: list[weakref.ref] = []
    found: list[int] = []

    def wrapped(model, *args, real=methods.wrap_model, **kwargs):
        dense.extend(map(weakref.ref, block_linears(model).values()))
        return real(model, *args, **kwargs)

    def merged(model, real=methods.merge_model):
        before = [*dense, *map(weakref.ref, wrapped_linears(model).values())]
        real(model)
        gc.collect()
        found.append(sum(each() is not None for each in before))
        return model

    monkeypatch.setattr(methods, "wrap_model", wrapped)
    monkeypatch.setattr(methods, "merge_model", merged)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_sparse_checkpoint(workspace, tmp_path, method, held_after_merging):
    output = tmp_path / "out"
    record = run_recipe(parse_recipe(settings(workspace, output, method=method)))
    dense, result = record.results
    assert dense.method == "dense" and dense.sparsity < 0.01
    assert result.method == method
    # Per-row floors over 32 and 64 columns at 50 % are exact; CKA rates move blocks by at most delta.
    assert result.sparsity == pytest.approx(0.5, abs=1 / 32)
    assert result.train_tokens == (0 if method == "prune_only" else 32 * 12)
    assert (result.perplexity_unmerged is not None) == (method in ("lora", "sora"))
    model = AutoModelForCausalLM.from_pretrained(output)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    assert zeros == result.zeros
    saved = json.loads((output / "losa_config.json").read_text())
    assert saved["method"] == method and len(saved["masks"]) == 3 * 7
    assert not (tmp_path / "out.work").exists()
    assert held_after_merging == [0], "a merged model would stand beside another set of weights"


def test_training_recovers_what_pruning_lost(workspace, tmp_path):
    changes = {"compare": ["prune_only"], "prune": {"sparsity": 0.6}}
    recipe = settings(workspace, tmp_path / "out", **changes)
    recipe["train"] |= {"max_tokens": 32 * 60, "learning_rate": 1e-2}
    results = {r.method: r for r in run_recipe(parse_recipe(recipe)).results}
    assert results["losa"].perplexity < results["prune_only"].perplexity


def test_fine_tuning_of_the_dense_model_has_no_teacher(workspace, tmp_path):
    """It would learn from itself: nothing."""
    found = []
    for distill in (None, {"weight": 1.0}):
        recipe = settings(workspace, tmp_path / str(distill is None), method="finetune_then_prune")
        recipe["train"] |= {"distill": distill}
        found.append(run_recipe(parse_recipe(recipe)).results[-1].perplexity)
    assert found[0] == found[1]


def test_methods_do_not_disturb_each_other(workspace, tmp_path):
    """Nor their teachers."""
    recipe = settings(workspace, tmp_path / "alone")
    recipe["train"] |= {"norms": 0.5, "distill": {"weight": 0.5}}
    alone = run_recipe(parse_recipe(recipe))
    compare = ["lora", "finetune_then_prune", "sparse_lora", "prune_only"]
    together = run_recipe(parse_recipe(recipe | {"output": str(tmp_path / "together"), "compare": compare}))
    assert [r.method for r in together.results] == ["dense", *compare, "losa"]
    assert together.results[-1].perplexity == alone.results[-1].perplexity
    assert together.masks == alone.masks


@pytest.mark.parametrize(
    "pruner, allocation, within",
    [
        ("wanda", {}, "run_round"),
        ("sparsegpt", {"rates": "atp", "per": "linear"}, "run_round"),
        ("sparsegpt", {"rates": "fisher", "per": "linear"}, "run_round"),
        ("wanda", {"rates": "fisher"}, "train"),
        ("wanda", {"rates": "fisher", "per": "row"}, "train"),
    ],
)
def test_resume_gives_the_uninterrupted_result(workspace, tmp_path, monkeypatch, pruner, allocation, within):
    changes = {"prune": {"sparsity": 0.5, "pruner": pruner}, "compare": ["prune_only"], "rounds": {"count": 3}}
    changes["allocation"] = {"mean_rank": 2, "rank_max": 6} | allocation
    whole = run_recipe(parse_recipe(settings(workspace, tmp_path / "whole", **changes)))
    recipe = parse_recipe(settings(workspace, tmp_path / "parts", **changes))

    from losa.algorithm import engine

    run_round = engine.Engine.run_round

    def interrupted(self, plan):
        if plan.index == 3:
            raise KeyboardInterrupt
        if plan.index == 2 and within == "train":  # the newest state then has masks and adapters in one directory
            monkeypatch.setattr(MethodRun, "_train", stopped)
        return run_round(self, plan)

    def stopped(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Engine, "run_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe)
    monkeypatch.undo()
    # What the first round measured of the dense model is not measured again.
    monkeypatch.delattr(engine, "energies_of")
    assert not (tmp_path / "parts").exists()
    with pytest.raises(OutputError, match="--resume"):
        run_recipe(recipe)
    resumed = run_recipe(recipe, resume=True)
    assert resumed.masks == whole.masks
    assert resumed.results[-1].perplexity == whole.results[-1].perplexity
    absent = {"ranks": False, "delta": allocation.get("rates") != "atp", "linear_ranks": "per" not in allocation}
    for name, nothing in absent.items():
        found = [getattr(r, name) for r in resumed.rounds]
        assert found == [getattr(r, name) for r in whole.rounds] and (None in found) == nothing, name


def test_non_finite_loss_leaves_no_output(workspace, tmp_path):
    recipe = settings(workspace, tmp_path / "out")
    recipe["train"] |= {"learning_rate": 1e30, "max_grad_norm": 1e30, "max_tokens": 32 * 40}
    with pytest.raises(NumericsError, match="round 1"):
        run_recipe(parse_recipe(recipe))
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept_unless_told(workspace, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    recipe = parse_recipe(settings(workspace, output, method="prune_only"))
    with pytest.raises(OutputError, match="out"):
        run_recipe(recipe)
    with pytest.raises(OutputError, match="losa did not write it.*--force"):
        run_recipe(recipe, overwrite=True)
    assert (output / "precious").read_text() == "mine"
    run_recipe(recipe, overwrite=True, force=True)
    assert (output / "losa_config.json").exists()
    run_recipe(recipe, overwrite=True)


@pytest.mark.parametrize("section, key, value", [("train", "data", "nowhere.txt"), ("evaluate", "data", "nowhere.txt")])
def test_missing_data_is_named(workspace, tmp_path, section, key, value):
    recipe = settings(workspace, tmp_path / "out")
    recipe[section] |= {key: value}
    with pytest.raises(LosaError, match="nowhere"):
        run_recipe(parse_recipe(recipe))
    assert not (tmp_path / "out").exists()


def test_rank_above_dimension_is_refused(workspace, tmp_path):
    recipe = settings(workspace, tmp_path / "out", method="sparse_lora", lora={"rank": 64})
    with pytest.raises((LosaError, ValueError), match="rank"):
        run_recipe(parse_recipe(recipe))


def test_global_lr_schedule_and_accumulation_run(workspace, tmp_path):
    recipe = settings(workspace, tmp_path / "out")
    recipe["train"] |= {"lr_schedule": "global", "gradient_accumulation": 2, "activation_checkpointing": True}
    record = run_recipe(parse_recipe(recipe))
    assert sum(r.train_steps for r in record.rounds) > 0


def test_whether_blocks_can_be_run_one_by_one_is_found_out_once(workspace, tmp_path, monkeypatch):
    checked, check = [], BlockStream._check_replay
    monkeypatch.setattr(BlockStream, "_check_replay", lambda self, *a: (checked.append(a[1].shape), check(self, *a)))
    recipe = settings(workspace, tmp_path / "out", method="sparse_lora", compare=["prune_only"])
    run_recipe(parse_recipe(recipe))
    assert checked == [(1, recipe["calibration"]["length"])]


def pruned_in_memory(workspace, tmp_path, **changes):
    """What ``prune_only`` makes of a tiny model, without files."""
    recipe = parse_recipe(settings(workspace, tmp_path / "unused", method="prune_only", **changes))
    tokens = calibration_tokens(recipe.calibration.data, tiny_tokenizer(), 4, 32, 0)
    model = tiny_llama(layers=3)
    return MethodRun("prune_only", model, recipe, Inputs(tokens, None, lambda m: None), tmp_path).run()


def test_method_run_needs_no_files(workspace, tmp_path):
    """The harness works on a model in memory, as the quality benchmark uses it."""
    outcome = pruned_in_memory(workspace, tmp_path)
    assert outcome.result.perplexity is None and len(outcome.masks) == 21
    assert all(m.dtype == torch.uint8 for m in outcome.masks.values())


def test_methods_that_prune_at_once_get_the_rates_of_blocks_where_a_recipe_says_so(workspace, tmp_path):
    found = {}
    for whose in ("dynamic", "all"):
        allocation = {"rates": "update", "delta": 0.2, "apply_to": whose}
        (record,) = pruned_in_memory(workspace, tmp_path, allocation=allocation).rounds
        found[whose] = record.sparsity
    assert max(found["dynamic"]) - min(found["dynamic"]) < 1 / 32, "a row of 32 columns keeps whole weights"
    assert max(found["all"]) - min(found["all"]) > 0.1
    assert sum(found["all"]) == pytest.approx(sum(found["dynamic"]), abs=3 / 32)
