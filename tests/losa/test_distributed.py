"""Whole runs: processes with a model each, and with one together, do what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from losa.model.blocks import find_blocks
from tests.helpers.exports import tensors_of
from tests.helpers.kinds import KINDS, of_kind
from tests.helpers.processes import run_groups
from tests.helpers.tiny import tiny_llama, tiny_tokenizer
from tests.helpers.workers import running


@pytest.mark.subprocess
def test_a_run_is_the_same_however_processes_hold_the_model(tmp_path):
    tiny_llama(layers=2).save_pretrained(tmp_path / "model")
    of_kind(KINDS["Mixtral"]).save_pretrained(tmp_path / "mixture")
    for model in ("model", "mixture"):
        tiny_tokenizer().save_pretrained(tmp_path / model)
    (tmp_path / "text.txt").write_text(running.TEXT * 40)
    found = run_groups("running", list(running.CASES), tmp_path / "found", str(tmp_path))
    held = {name: each for processes in found.values() for name, each in processes[-1].items()}
    # The mesh, and whether rows wait in host memory.
    shards = {"one in shards": [[1], True], "fsdp": [[2], False], "hsdp": [[2, 2], False]}
    assert held == {"one": [], "ddp": []} | shards
    assert_same_smaller_model(tmp_path)
    for cases in (running.CASES, running.EXPERTS):
        assert_same_runs(tmp_path, [name for own in cases.values() for name in own])
    masks = json.loads((tmp_path / "experts, fsdp" / "losa_config.json").read_text())["masks"]
    assert masks.keys() == find_blocks(of_kind(KINDS["Mixtral"])).linears().keys(), "experts among them"
    for name in running.EXPERTS[1]:
        assert tensors_of(tmp_path / name).keys() == tensors_of(tmp_path / "mixture").keys()


def assert_same_runs(root: Path, names: list[str]) -> None:
    one, *others = (json.loads((root / name / "losa_config.json").read_text()) for name in names)
    for other in others:
        for what in ("train_steps", "ranks"):
            assert [r[what] for r in other["rounds"]] == [r[what] for r in one["rounds"]]
        assert [result["method"] for result in other["results"]] == [result["method"] for result in one["results"]]
        for found, expected in zip(other["results"], one["results"], strict=True):
            # The same sum of gradients, taken in another order; a few near-ties of the second round's mask may differ.
            assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
            assert found["zeros"] == expected["zeros"] and found["prunable"] == expected["prunable"]


def assert_same_smaller_model(root: Path) -> None:
    """Processes that hold the model together leave the smaller model that one process leaves."""
    one, shards = (root / name for cases in running.SMALLER.values() for name in cases)
    first, second = (json.loads((directory / "losa_config.json").read_text()) for directory in (one, shards))
    assert first["shrunk"] == second["shrunk"] and first["masks"] == second["masks"]
    configs = [json.loads((directory / "config.json").read_text()) for directory in (one, shards)]
    assert configs[0] == configs[1] and configs[0]["num_attention_heads"] == 2
    models = [AutoModelForCausalLM.from_pretrained(directory) for directory in (one, shards)]
    with torch.no_grad():
        assert torch.equal(*(model(torch.arange(20)[None]).logits for model in models))
