"""Going on with unfinished work: only with the same model, data and settings; what is damaged is made again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from losa.errors import OutputError
from losa.recipe.methods import METHODS
from losa.recipe.reading import parse_recipe
from losa.record import MethodResult
from losa.run import pipeline
from losa.run.documents import belonging, read_document, write_document
from losa.run.fingerprint import model_digest, tensor_digest
from losa.run.methods import Engine
from losa.run.pipeline import run_recipe
from losa.run.resume import load_result, save_result
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog.\n" for i in range(40))


class Killed(BaseException):
    pass


def inputs(root: Path, seed=0) -> Path:
    tiny_llama(layers=2, seed=seed).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    for name in ("calibration", "train", "heldout"):
        (root / f"{name}.txt").write_text(TEXT)
    return root


def recipe(root: Path, **changes):
    settings = {
        "model": str(root / "model"),
        "output": str(root / "out"),
        "device": "cpu",
        "prune": {"sparsity": 0.5},
        "compare": ["prune_only"],
        "rounds": {"count": 2},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "lora": {"rank": 2},
        "calibration": {"data": str(root / "calibration.txt"), "samples": 2, "length": 16, "cka_samples": 2},
        "train": {"data": str(root / "train.txt"), "length": 16, "batch_size": 2, "max_tokens": 64},
        "evaluate": {"data": str(root / "heldout.txt"), "length": 32, "max_windows": 2},
    }
    for key, value in changes.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return parse_recipe(settings)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run that died in its second round, after a comparison and the first round; and a copy of its directory."""
    root = inputs(tmp_path_factory.mktemp("work") / "root")
    run_round = Engine.run_round

    def dies(self, plan):
        if plan.index == 2:
            raise Killed
        return run_round(self, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run_round", dies)
        with pytest.raises(Killed):
            run_recipe(recipe(root))
    assert {path.name for path in (root / "out.work").iterdir()} == {"losa", "prune_only.json", "work.json"}
    shutil.copytree(root, root.with_name("copy"))
    return root


@pytest.fixture
def interrupted(work):
    shutil.rmtree(work)
    return shutil.copytree(work.with_name("copy"), work)


def other_text(name):
    def change(root):
        (root / f"{name}.txt").write_text(TEXT.replace("fox", "cat"))

    return change


def other_weight(root):
    model = tiny_llama(layers=2)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6  # the smallest change, far from every block
    model.save_pretrained(root / "model")


@pytest.mark.parametrize(
    "change, what",
    [
        (other_weight, "model weights"),
        (other_text("calibration"), "calibration tokens"),
        (other_text("train"), "training tokens"),
        (other_text("heldout"), "evaluation tokens"),
    ],
    ids=["weights", "calibration", "train", "heldout"],
)
def test_changed_inputs_are_refused_by_name(interrupted, monkeypatch, change, what):
    change(interrupted)
    # Before any work: not even the dense model is evaluated.
    monkeypatch.setattr(pipeline, "_dense_result", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(OutputError, match=f"the {what} changed since it was written; .* --overwrite"):
        run_recipe(recipe(interrupted), resume=True)
    assert (interrupted / "out.work" / "losa" / "checkpoints" / "round-01").is_dir()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"prune": {"sparsity": 0.6}},
            r"result .*prune_only\.json: .*another recipe \(prune\.sparsity was 0\.5, is 0\.6",
        ),
        ({"train": {"learning_rate": 0.5}}, r"checkpoint .*round-01: .*\(train\.learning_rate was 0\.0002, is 0\.5"),
        ({"rounds": {"count": 3}}, r"checkpoint .*round-01: .*\(rounds\.count was 2, is 3"),
    ],
)
def test_changed_settings_are_refused_by_name(interrupted, changes, message):
    with pytest.raises(OutputError, match=message):
        run_recipe(recipe(interrupted, **changes), resume=True)


def test_settings_that_change_no_number_may_change(interrupted):
    before = json.loads((interrupted / "out.work" / "prune_only.json").read_text())["result"]
    whole = run_recipe(recipe(interrupted, output=str(interrupted / "whole"), compare=[]))
    changes = {"compare": ["losa", "prune_only"], "train": {"activation_checkpointing": True}}
    record = run_recipe(recipe(interrupted, **changes), resume=True)
    assert [r.method for r in record.results] == ["dense", "prune_only", "losa"]
    assert vars(record.results[1]) == before
    assert record.masks == whole.masks and record.results[-1].perplexity == whole.results[-1].perplexity


def damage_cut(text):
    return text[:-30]


def damage_value(text):
    return text.replace('"zeros": ', '"zeros": 1')


def damage_kind(text):
    return "[" * 2000 if text else text


@pytest.mark.parametrize("damage", [damage_cut, damage_value, damage_kind, lambda text: "null", lambda text: "{}"])
def test_a_damaged_result_is_made_again(interrupted, caplog, damage):
    path = interrupted / "out.work" / "prune_only.json"
    before = json.loads(path.read_text())["result"]
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING, logger="losa"):
        assert load_result(interrupted / "out.work", "prune_only", recipe(interrupted), {}) is None
    assert "prune_only.json: damaged" in caplog.text and "runs again" in caplog.text
    if damage is damage_value:
        record = run_recipe(recipe(interrupted), resume=True)
        assert record.results[1].zeros == before["zeros"] and record.results[1].perplexity == before["perplexity"]


def test_a_checkpoint_of_other_records_is_refused(interrupted):
    path = interrupted / "out.work/losa/checkpoints/round-01/state.json"
    document = read_document(path)
    document["state"]["rounds"][0]["colour"] = "red"
    write_document(path, {key: value for key, value in document.items() if key != "checksum"})
    with pytest.raises(OutputError, match="another version of losa"):
        run_recipe(recipe(interrupted), resume=True)


def test_what_a_result_depends_on(tmp_path):
    result = MethodResult("prune_only", 2.0, 0.5, 1, 2, 0.1)
    digests = {"model weights": "a", "training tokens": "b"}
    save_result(tmp_path, result, recipe(tmp_path), digests)
    for changes in (
        {"rounds": {"count": 5}},
        {"lora": {"rank": 3}},
        {"train": {"learning_rate": 1.0}},
        {"method": "lora"},
        {"reconstruct": {}},
    ):
        same = recipe(tmp_path, **changes)
        assert load_result(tmp_path, "prune_only", same, digests | {"training tokens": "c"}) == result
    for changes in ({"seed": 1}, {"calibration": {"samples": 3}}, {"evaluate": {"length": 16}}):
        with pytest.raises(OutputError, match="another recipe"):
            load_result(tmp_path, "prune_only", recipe(tmp_path, **changes), digests)
    assert load_result(tmp_path, "lora", recipe(tmp_path), digests) is None


def test_digests():
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    digest = model_digest(model)
    assert digest == model_digest(tiny_llama(layers=1, tie_word_embeddings=True))
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    assert model_digest(model) != digest
    zeros = torch.zeros(2, 3)
    seen = [zeros, zeros.T, zeros.half(), zeros.flatten(), torch.zeros(0, 3), -zeros]
    assert len({tensor_digest(tensor) for tensor in seen}) == len(seen)
    # What a view covers, not the memory that it is a part of.
    assert tensor_digest(torch.arange(6)[::2]) == tensor_digest(torch.tensor([0, 2, 4]))


def test_a_methods_own_setting_belongs_to_it_alone():
    text = {"data": "text.txt"}
    settings = {"model": "m", "output": "out", "prune": {"sparsity": 0.5}, "calibration": text, "train": text}
    recipe = parse_recipe(settings | {"lora": {"gate_penalty": 0.7}})
    own = {name: belonging(recipe, name, {})["recipe"].get("lora", {}) for name in METHODS}
    assert {name for name, lora in own.items() if "gate_penalty" in lora} == {"sora"}
    assert {name for name, lora in own.items() if "rank" not in lora} == {"losa", "prune_only"}
    agreed = parse_recipe(settings | {"prune": {"sparsity": 0.5, "partly": True}})
    assert all(
        belonging(recipe, name, {})["recipe"]["prune"] == belonging(agreed, name, {})["recipe"]["prune"]
        for name in METHODS
    )
