"""Families of models: masks by the book, merging that keeps the function, and whole runs."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from losa.data.tokens import calibration_tokens
from losa.model.blocks import find_blocks
from losa.model.wrapping import merge_model, wrapped_linears
from losa.output.inspection import inspect_directory
from losa.packed.directory import load, pack_directory
from losa.recipe.reading import parse_recipe
from losa.run.pipeline import run_recipe
from losa.storage.files import RECORD
from losa.storage.tensor_files import checkpoint_tensors
from tests.helpers.book import check_mask, wanda_by_the_book
from tests.helpers.command_line import fail, succeed
from tests.helpers.exports import all_matrices
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.runs import settings
from tests.helpers.tiny import assert_same_function, logits, randomise, tiny_tokenizer, wrap

families = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@families
def test_masks_are_wanda_s_by_the_book(kind, kind_directory, tmp_path, caplog):
    made = kind_directory(kind.name)
    recipe = parse_recipe(settings(made, tmp_path / "out", method="prune_only", evaluate=None))
    record = run_recipe(recipe)
    dense, pruned = of_kind(kind), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = calibration_tokens(recipe.calibration.data, tiny_tokenizer(), 4, 32, recipe.seed)
    blocks = find_blocks(dense)
    before, after = (all_matrices(model) for model in (of_kind(kind), pruned))
    scores = wanda_by_the_book(dense, blocks, ids, 0.5, kind.routers)
    left = {name for name in before if name.endswith((*kind.dense, *kind.routers))}
    assert record.masks.keys() == scores.keys() - left, "all others are pruned"
    assert sum(before[name].numel() for name in scores.keys() - left) >= 0.9 * sum(w.numel() for w in before.values())
    check_packed(kind, tmp_path / "out", pruned)
    check_inspected(tmp_path / "out", record)
    for name, weight in after.items():
        if name in record.masks:
            check_mask(weight != 0, scores[name], 0.5)
            assert torch.equal(weight[weight != 0], before[name][weight != 0])
        else:
            assert torch.equal(weight, before[name])


def check_inspected(directory, record):
    """Every zero is seen, and a matrix that has lost its zeros."""
    found = inspect_directory(directory)
    assert not found.lost_zeros and sum(t.zeros for t in found.tensors) >= record.results[-1].zeros
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    changed = next(t.name for t in reversed(found.tensors) if t.zeros * 3 > t.total)
    tensors[changed] = torch.ones_like(tensors[changed])
    save_file(tensors, file, {"format": "pt"})
    assert inspect_directory(directory).lost_zeros == [changed]


def check_packed(kind, directory, dense):
    """The packed directory is the same function, and generates the same text."""
    report = pack_directory(directory, directory.with_name("packed"))
    assert report.packed == len(dense_linears(directory))
    packed, _ = load(directory.with_name("packed"))
    assert_same_function(logits(packed), logits(dense))
    ids = torch.tensor([[5, 17, 40, 8]])
    texts = [model.generate(ids, max_new_tokens=16, do_sample=False).tolist() for model in (packed, dense)]
    assert texts[0] == texts[1]


def dense_linears(directory):
    return json.loads((directory / RECORD).read_text())["masks"]


@families
def test_merging_keeps_the_function(kind, caplog):
    model = of_kind(kind)
    with caplog.at_level(logging.WARNING, logger="losa"):
        layers = wrap(model)
    assert ("reads itself" in caplog.text) == bool(kind.dense)
    randomise(layers)
    wrapped = logits(model)
    # What is trained is what is evaluated: no kernel of training passes mask and adapter by.
    assert_same_function(logits(model.train()), wrapped)
    merge_model(model)
    assert not wrapped_linears(model)
    assert_same_function(logits(model.eval()), wrapped)
    assert all(module.training for module in model.train().modules())


@families
def test_a_run_in_rounds(kind, kind_directory, tmp_path):
    made = kind_directory(kind.name)
    record = run_recipe(parse_recipe(settings(made, tmp_path / "out")))
    weights = all_matrices(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    zeros = {name: float((weights[name] == 0).float().mean()) for name in record.masks}
    assert sum(zeros.values()) / len(zeros) == pytest.approx(0.5, abs=1 / 32)
    assert stored_names(tmp_path / "out") == stored_names(made / "model"), "names on disk are what they were"
    assert record.results[-1].perplexity < record.results[0].perplexity * 3


def stored_names(directory):
    with checkpoint_tensors(directory) as files:
        return {name: (shape, dtype) for name, (dtype, shape) in files.stored.items()}


def test_a_run_that_leaves_most_of_a_model_dense_asks_first(kind_directory, tmp_path, monkeypatch):
    """Experts that are no linears are four fifths of the blocks' weights."""
    made, out = kind_directory("Mixtral"), tmp_path / "out"
    model = of_kind(KINDS["Mixtral"])
    stack = type(model.model.layers[0].mlp.experts)
    forward = stack.forward
    monkeypatch.setattr(stack, "forward", lambda self, *args: 2 * forward(self, *args))
    block = model.model.layers[0]
    prunable = 2 * sum(linear.weight.numel() for linear in block.self_attn.children())
    every = 2 * sum(p.numel() for p in block.parameters() if p.dim() > 1)
    options = ["--data", made / "text.txt", "--sparsity", 0.5, "--samples", 2, "--length", 32, "--output", out]
    said = fail("prune", made / "model", *options)
    share = prunable / every
    assert f"{prunable:,} of the {every:,} weights" in said and f"({share:.1%})" in said and "--yes" in said
    assert f"instead of 50% zeros the blocks would have {share / 2:.1%}" in said
    assert not out.exists() and not out.with_name("out.work").exists()
    succeed("prune", made / "model", *options, "--yes")
    record = json.loads((out / RECORD).read_text())
    assert record["recipe"]["prune"]["partly"] and len(record["masks"]) == 2 * 4
    recipe = settings(made, tmp_path / "own", method="prune_only", evaluate=None)
    recipe["prune"] = {"sparsity": 0.5, "targets": ["q_proj"]}
    assert len(run_recipe(parse_recipe(recipe)).masks) == 2, "who names linears means them"
