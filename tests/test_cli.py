"""The command line as a user meets it: arguments, messages, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import losa.run
from losa import cli
from losa.errors import RecipeError
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent
TEXT = "The quick brown fox jumps over the lazy dog and back again.\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tiny_llama(layers=2).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT * 40)
    recipe = {
        "model": str(root / "model"),
        "output": str(root / "out"),
        "device": "cpu",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": str(root / "text.txt"), "samples": 2, "length": 16, "cka_samples": 2},
        "train": {"data": str(root / "text.txt"), "length": 16, "batch_size": 2, "max_tokens": 64},
        "evaluate": {"data": str(root / "text.txt"), "length": 32, "max_windows": 2},
        "allocation": {"mean_rank": 2, "rank_max": 4},
        "rounds": {"count": 2},
        "lora": {"rank": 2},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def invoke(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["losa", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
        raise SystemExit(0)
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_run_inspect_and_eval(workspace, tmp_path, capsys, monkeypatch):
    output = tmp_path / "sparse"
    recipe = workspace / "recipe.yaml"
    changes = ["--set", "compare=[prune_only]", "--set", "allocation.rates=uniform"]
    code, out, err = invoke(capsys, monkeypatch, "run", recipe, "--output", output, *changes)
    assert code == 0, err
    assert "LoSA, merged" in out and "pruned only" in out
    code, out, _ = invoke(capsys, monkeypatch, "inspect", output, "--figures", tmp_path / "figures")
    assert code == 0 and "model.layers.1" in out and (tmp_path / "figures/sparsity.png").exists()
    numbers = tmp_path / "numbers.json"
    text = workspace / "text.txt"
    code, out, _ = invoke(capsys, monkeypatch, "eval", output, "--data", text, "--length", 32, "--json", numbers)
    assert code == 0 and "perplexity" in out and "(50.00%)" in out
    assert yaml.safe_load(numbers.read_text())["perplexity"]["length"] == 32


def test_prune_without_training(workspace, tmp_path, capsys, monkeypatch):
    arguments = ["--output", tmp_path / "p", "--data", workspace / "text.txt", "--samples", 2, "--length", 16]
    code, out, err = invoke(capsys, monkeypatch, "prune", workspace / "model", "--pattern", "2:4", *arguments)
    assert code == 0, err
    code, out, _ = invoke(capsys, monkeypatch, "inspect", tmp_path / "p")
    assert "2:4" in out and "0.5000" in out


def test_plan(workspace, capsys, monkeypatch):
    code, out, err = invoke(capsys, monkeypatch, "plan", workspace / "recipe.yaml", "--no-probe")
    assert code == 0, err
    assert "prunable in 2 blocks" in out and "rounds" in out


def test_arguments_reach_the_run(workspace, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(losa.run, "run_recipe", lambda recipe, **options: seen.update(recipe=recipe, **options))
    code, _, err = invoke(
        capsys, monkeypatch, "run", workspace / "recipe.yaml", "--resume", "--overwrite", "--set", "prune.sparsity=0.25"
    )
    assert code == 0, err
    assert seen["resume"] and seen["overwrite"] and seen["recipe"].prune.sparsity == 0.25


def test_data_directory(workspace, tmp_path, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(losa.run, "run_recipe", lambda recipe, **options: seen.update(recipe=recipe))
    for name in ("calibration.txt", "train.jsonl"):
        (tmp_path / name).write_text(TEXT)
    code, _, err = invoke(capsys, monkeypatch, "run", workspace / "recipe.yaml", "--data", tmp_path)
    assert code == 1 and "heldout" in err
    (tmp_path / "heldout").mkdir()
    code, _, err = invoke(capsys, monkeypatch, "run", workspace / "recipe.yaml", "--data", tmp_path)
    assert code == 0, err
    assert seen["recipe"].train.data[0].path == str(tmp_path / "train.jsonl")
    assert seen["recipe"].evaluate.data.path == str(tmp_path / "heldout")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("prune.sparsity=0", "prune.sparsity"),
        ("prune.sparsity=0.96", "prune.sparsity"),
        ("prune.sparsity=1", "prune.sparsity"),
        ("prune.spasity=0.5", "prune.spasity: unknown key"),
        ("allocation.mean_rank=99", "mean_rank"),
        ("allocation.rank_max=64", "allocation.rank_max: expected at most 16"),
        ("calibration.data=/nowhere/x.jsonl", "/nowhere/x.jsonl"),
        ("calibration.samples=100000", "calibration"),
        ("model=/nowhere/model", "/nowhere/model"),
        ("prune.pruner=nothing", "prune.pruner"),
        ("prune.targets=[no_proj]", "no_proj"),
        ("no-equals-sign", "expected key=value"),
    ],
)
def test_bad_input_is_one_message_and_no_output(workspace, tmp_path, capsys, monkeypatch, setting, message):
    output = tmp_path / "out"
    code, _, err = invoke(capsys, monkeypatch, "run", workspace / "recipe.yaml", "--output", output, "--set", setting)
    assert code == 1
    assert message in err and "Traceback" not in err
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "/nowhere.yaml"],
        ["inspect", "/nowhere"],
        ["plan", "/nowhere.yaml"],
        ["eval", "/nowhere/model", "--data", "x.txt"],
        ["eval", "/nowhere/model"],
    ],
)
def test_missing_things(capsys, monkeypatch, arguments):
    code, _, err = invoke(capsys, monkeypatch, *arguments)
    assert code == 1 and err.startswith("losa: ") and "Traceback" not in err


def test_usage_errors_exit_with_2(capsys, monkeypatch):
    assert invoke(capsys, monkeypatch, "run")[0] == 2
    assert invoke(capsys, monkeypatch, "nonsense")[0] == 2


def test_interrupt(workspace, capsys, monkeypatch):
    def interrupted(recipe, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(losa.run, "run_recipe", interrupted)
    code, _, err = invoke(capsys, monkeypatch, "run", workspace / "recipe.yaml")
    assert code == 130


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["losa", "--debug", "run", "/nowhere.yaml"])
    monkeypatch.setenv("LOSA_DEBUG", "0")
    with pytest.raises(RecipeError):
        cli.main()


def test_help_is_quick_and_heavy_imports_wait():
    code = "import sys, losa.cli; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'too early'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
