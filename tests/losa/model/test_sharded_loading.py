"""A model whose rows are read by several processes: the same model as a whole one, and the same errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.families import save_families
from tests.helpers.processes import run_workers
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

PROCESSES = 3
UP = "model.layers.1.mlp.up_proj.weight"


def edit(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, {"format": "pt"})


def value(row: int, number: float):
    def change(tensors):
        tensors[UP][row, 3] = number
        return tensors

    return change


def configured(**settings):
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


# What happens to a checkpoint, and what every process says of it; the last row belongs to the last process.
DAMAGES = {
    "not-a-number": (lambda d: edit(d, value(63, float("nan"))), f"{UP} is nan at row 63, column 3; 1 of 2048"),
    "overflow": (lambda d: edit(d, value(30, 1e30)), f"{UP} is 1e\\+30 at row 30, column 3, beyond 65504"),
    "missing": (lambda d: edit(d, lambda t: {n: v for n, v in t.items() if n != UP}), f"lacks 1 weight.*{UP}"),
    "shape": (lambda d: edit(d, lambda t: t | {UP: torch.ones(3, 3)}), f"{UP}: expected shape .64, 32., the file"),
    "truncated": (truncated, "model.safetensors: cannot be read .it ends within"),
    "adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "a PEFT adapter lies beside the model"),
    "packed": (lambda d: (d / "losa_packed.json").write_text("{}"), "packed; `losa unpack` it first"),
    "quantised": (configured(quantization_config={"quant_method": "awq"}), "quantised .awq."),
    "two-stacks": (configured(is_encoder_decoder=True), "got an encoder-decoder"),
    "empty": (lambda d: [file.unlink() for file in d.iterdir()], "cannot be loaded from"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[list[str], list[dict]]:
    root = tmp_path_factory.mktemp("models")
    names = save_families(root)
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(root / "tied", root / "damaged" / name)
        damage(root / "damaged" / name)
    # Config.json states tied embeddings, but the file holds two: equal, and different.
    for name, factor in (("twice", 1), ("untied", 2)):
        shutil.copytree(root / "tied", root / name)
        edit(root / name, lambda t, by=factor: t | {"lm_head.weight": t["model.embed_tokens.weight"] * by})
    (root / "llama" / "llama.gguf").touch()
    shutil.copytree(root / "tied", root / "trained")
    edit(root / "trained", lambda t: t | {UP: t[UP] + 1})
    large = tiny_llama(layers=1, hidden=256, tie_word_embeddings=True)
    large.resize_token_embeddings(100_000)
    large.save_pretrained(root / "large")
    tiny_tokenizer().save_pretrained(root / "large")
    names += ["twice", "untied"]
    return names, run_workers("sharded_loading", PROCESSES, root / "results", str(root), *names)


@pytest.mark.subprocess
def test_rows_of_all_processes_are_the_model(results):
    names, processes = results
    for name in names:
        found = [process[name] for process in processes]
        for each in found:
            assert each["difference"] == [], name
            assert each["digest"] and each["sharding"] and each["device"] == "cpu", name
            assert each["tokens"] == tiny_tokenizer()("ab").input_ids
        if name in ("llama", "tied", "Qwen2", "GPTNeoX", "Qwen3Moe"):
            # Every byte is read by one process.
            assert sum(each["read"] for each in found) == found[0]["whole"], name
            assert all(each["read"] == each["rows"] * 4 for each in found), name


@pytest.mark.subprocess
def test_no_process_holds_the_model(results):
    for process in results[1]:
        most, size = process["memory"]
        # Its third, and what the interpreter and the tokenizer take meanwhile.
        assert size > 100e6 and most < 0.5 * size


@pytest.mark.subprocess
@pytest.mark.parametrize("damage", DAMAGES)
def test_all_processes_say_what_one_says(results, damage):
    for process in results[1]:
        sharded, whole = process["errors"][damage]
        assert sharded == process["errors"][damage][0] and sharded.startswith("ModelError: ")
        assert re.search(DAMAGES[damage][1], sharded), sharded
        assert sharded == whole or damage in ("truncated", "shape"), (sharded, whole)


@pytest.mark.subprocess
def test_what_cannot_be_loaded_in_shards(results):
    errors = [process["errors"] for process in results[1]]
    for each in errors:
        assert "a GGUF file cannot be read in shards; load it in one process" in each["gguf"][0]
        assert each["dtype"][0].startswith("ModelError: dtype: expected one of auto,")
        assert each["offline"][0].startswith("ModelError: model 'some/model': not a local directory, and cannot be")
        for case in ("other files", "other weights"):
            assert re.match("OutputError: model '.*': weights: process 0 has .*, process 1 has", each[case][0]), case
        assert "process 0 has a directory, process 1 has no directory of that name" in each["one has none"][0]
    assert errors[0]["offline"] == errors[1]["offline"]


@pytest.mark.subprocess
def test_hub_files_are_downloaded_once_for_each_machine(results):
    for index, process in enumerate(results[1]):
        for case, revisions in (("hub", [None, "commit"]), ("hub, one file", [None])):
            found = process[case]
            first = [[revision, False] for revision in revisions] if index in (0, 2) else []
            assert found["calls"] == [*first, *([revision, True] for revision in revisions)], case
            assert found["difference"] == []
            assert "config.json" in found["files"] and "llama.gguf" not in found["files"]
        told = process["hub, two revisions"]["error"]
        assert "model 'tied': revision: process 0 has commit-0, process 2 has commit-1; " in told
