"""The command line as a user meets it: arguments, messages, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from losa import __version__
from losa.errors import LosaError, RecipeError
from losa.run import pipeline
from tests.helpers.command_line import fail, invoke, succeed
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]
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


@pytest.fixture(autouse=True)
def no_trace_in_the_environment(monkeypatch):
    """The command line sets this one when nobody watches; put back afterwards."""
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def passed(monkeypatch) -> dict:
    """What run_recipe was called with, instead of running it."""
    seen = {}
    monkeypatch.setattr(pipeline, "run_recipe", lambda recipe, **options: seen.update(recipe=recipe, **options))
    return seen


def test_run_inspect_and_eval(workspace, tmp_path):
    output = tmp_path / "sparse"
    changes = ["--set", "compare=[prune_only]", "--set", "allocation.rates=uniform"]
    out = succeed("run", workspace / "recipe.yaml", "--output", output, *changes)
    assert "LoSA" in out and "pruned only" in out
    out = succeed("inspect", output, "--figures", tmp_path / "figures")
    assert "| model.layers.1 |" in out and "50.00 %" in out and "2 non-overlapping windows of 32 tokens" in out
    assert (tmp_path / "figures/sparsity.png").exists()
    numbers = tmp_path / "numbers.json"
    out = succeed("eval", output, "--data", workspace / "text.txt", "--length", 32, "--json", numbers)
    windows = (40 * len(TEXT) + 39 * len("\n\n")) // 32  # a token a character
    assert "(50.00%)" in out and f"{windows} non-overlapping windows of 32 tokens, {32 * windows:,} in all" in out
    written = json.loads(numbers.read_text())
    assert written["sparsity"] == 0.5 and written["perplexity"]["windows"] == windows
    assert f"perplexity {written['perplexity']['value']:.3f}" in out


def test_prune_without_training(workspace, tmp_path):
    arguments = ["--output", tmp_path / "p", "--data", workspace / "text.txt", "--samples", 2, "--length", 16]
    succeed("prune", workspace / "model", "--pattern", "2:4", *arguments)
    out = succeed("inspect", tmp_path / "p")
    assert "2:4" in out and "50.00 %" in out
    assert "nothing to draw" in fail("inspect", workspace / "model", "--figures", tmp_path / "figures")


def test_prune_builds_a_recipe_without_training(passed):
    arguments = ["--pruner", "sparsegpt", "--sparsity", 0.6, "--statistics-gb", 0.5]
    arguments += ["--samples", 8, "--length", 64, "--seed", 3]
    flags = ["--overwrite", "--resume", "--force"]
    succeed("prune", "m", "--output", "o", "--data", "c.txt", "--eval-data", "e.txt", *flags, *arguments)
    recipe = passed["recipe"]
    assert passed["resume"] and passed["force"]
    assert (recipe.method, recipe.train, recipe.seed) == ("prune_only", None, 3)
    assert (recipe.prune.pruner, recipe.prune.sparsity, recipe.prune.pattern) == ("sparsegpt", 0.6, None)
    assert (recipe.calibration.samples, recipe.calibration.length) == (8, 64)
    assert recipe.calibration.statistics_gb == 0.5
    assert recipe.evaluate.data.path == "e.txt" and passed["overwrite"]
    arguments = ["--output", "o", "--data", "c.txt"]
    assert "exactly one of" in fail("prune", "m", *arguments)
    assert "exactly one of" in fail("prune", "m", *arguments, "--sparsity", 0.5, "--pattern", "2:4")


def test_plan(workspace):
    out = succeed("plan", workspace / "recipe.yaml", "--no-probe", "--set", "prune.sparsity=0.25")
    assert "24,864 parameters (float32), 18,432 prunable in 2 blocks" in out
    assert "25.0 %" in out and "losa: training" in out and "not measured" in out
    for option in ("--memory", "--gpus-per-node", "--host-memory", "--tflops", "--bandwidth"):
        result = invoke("plan", workspace / "recipe.yaml", option, 8)
        assert result.exit_code == 2 and "needs --gpus" in result.output


def test_other_commands_say_that_processes_do_the_same(monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "1")
    fail("inspect", "/nowhere")
    assert not caplog.text
    monkeypatch.setenv("WORLD_SIZE", "2")
    fail("inspect", "/nowhere")
    assert "losa inspect works in one process; it was started 2 times, and each does all of it" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    fail("inspect", "/nowhere")
    assert not caplog.text


def test_arguments_reach_the_run(workspace, passed):
    settings = ["--set", "prune.sparsity=", "--set", "prune.pattern=2:4", "--set", "train.learning_rate=1e-3"]
    succeed("run", workspace / "recipe.yaml", "--resume", "--overwrite", "--output", "~/there", *settings)
    recipe = passed["recipe"]
    assert passed["resume"] and passed["overwrite"]
    assert (recipe.prune.sparsity, recipe.prune.pattern, recipe.train.learning_rate) == (None, "2:4", 1e-3)
    assert recipe.output == Path("~/there").expanduser()
    succeed("run", workspace / "recipe.yaml")
    assert not passed["resume"] and not passed["overwrite"]
    assert passed["recipe"].output == workspace / "out"


def test_data_with_named_parts(workspace, tmp_path, passed):
    recipe = workspace / "recipe.yaml"
    for name in ("calibration.txt", "train.jsonl"):
        (tmp_path / name).write_text(TEXT)
    assert "heldout text is missing" in fail("run", recipe, "--data", tmp_path)
    (tmp_path / "heldout").mkdir()
    succeed("run", recipe, "--data", tmp_path, "--set", "train.data.text_field=body")
    (source,) = passed["recipe"].train.data
    assert (source.path, source.text_field) == (str(tmp_path / "train.jsonl"), "body")
    assert passed["recipe"].evaluate.data.path == str(tmp_path / "heldout")
    assert passed["recipe"].calibration.data[0].path == str(tmp_path / "calibration.txt")
    (tmp_path / "train.txt").write_text(TEXT)
    assert "train.jsonl and train.txt are both named train" in fail("run", recipe, "--data", tmp_path)
    (tmp_path / "heldout").rmdir()
    (tmp_path / "train.txt").unlink()
    succeed("run", recipe, "--data", tmp_path, "--set", "evaluate=", "--set", "seed=1")
    assert passed["recipe"].evaluate is None
    assert "no such file or directory" in fail("run", recipe, "--data", tmp_path / "nothing")


@pytest.mark.parametrize("name, text", [("train.jsonl", '{"text": "mine"}\n'), ("heldout.jsonl", "")])
def test_parts_replace_no_file_of_ones_own(workspace, tmp_path, passed, name, text):
    data, parts = tmp_path / "a.jsonl", tmp_path / "out.data"
    data.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(100)))
    parts.mkdir()
    (parts / name).write_text(text)
    arguments = ("run", workspace / "recipe.yaml", "--data", data, "--output", tmp_path / "out")
    assert f"would replace {parts / name}, which losa did not write" in fail(*arguments)
    assert (parts / name).read_text() == text and len(list(parts.iterdir())) == 1
    (parts / name).rename(tmp_path / name)
    succeed(*arguments)
    succeed(*arguments)


def test_data_without_named_parts_is_split_by_rows(workspace, tmp_path, passed):
    rows = [{"text": f"row {i}"} for i in range(100)]
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:10]))
    second.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    read = {}
    for data in (first, second):
        out = succeed("run", workspace / "recipe.yaml", "--data", data, "--output", tmp_path / "out")
        assert "was split by rows" in out and str(tmp_path / "out.data") in out
        recipe = passed["recipe"]
        paths = [recipe.calibration.data[0].path, recipe.train.data[0].path, recipe.evaluate.data.path]
        assert paths == [str(tmp_path / f"out.data/{part}.jsonl") for part in ("calibration", "train", "heldout")]
        read[data] = [sorted({line for line in Path(path).read_text().splitlines()}) for path in paths]
        assert [len(part) for part in read[data]] == [15, 60, 25]
        assert sorted(json.loads(line)["text"] for part in read[data] for line in part) == sorted(
            row["text"] for row in rows
        )
    # By content: neither the order of rows nor repeated ones move a row to another part.
    assert read[first] == read[second]


def test_one_text_file_is_cut_at_line_ends(workspace, tmp_path, passed):
    lines = [f"line {i}\n" for i in range(400)]
    (tmp_path / "book.raw").write_text("".join(lines))
    succeed("run", workspace / "recipe.yaml", "--data", tmp_path / "book.raw", "--output", tmp_path / "out")
    recipe = passed["recipe"]
    paths = [recipe.calibration.data[0].path, recipe.train.data[0].path, recipe.evaluate.data.path]
    texts = [Path(path).read_text() for path in paths]
    assert "".join(texts) == "".join(lines) and all(text.endswith("\n") for text in texts)
    shares = [len(text) / len("".join(lines)) for text in texts]
    assert shares == pytest.approx([0.15, 0.6, 0.25], abs=0.005)
    (tmp_path / "short.txt").write_text("one line")
    assert "too few" in fail("run", workspace / "recipe.yaml", "--data", tmp_path / "short.txt")
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert "2 rows are too few" in fail("run", workspace / "recipe.yaml", "--data", tmp_path / "short.jsonl")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("prune.sparsity=0", "prune.sparsity: "),
        ("prune.sparsity=0.96", "prune.sparsity: "),
        ("prune.sparsity=1", "prune.sparsity: "),
        ("prune.pattern=2:4", "exactly one of prune.sparsity and prune.pattern"),
        ("prune.spasity=0.5", "prune.spasity: unknown key; did you mean prune.sparsity?"),
        ("allocation.mean_rank=99", "rank_min <= mean_rank <= rank_max"),
        ("allocation.rank_max=200", "allocation.rank_max: "),
        ("allocation.rank_max=64", "allocation.rank_max: expected at most 16"),
        ("train=", "train: method 'losa' needs a train section"),
        ("calibration.data=/nowhere/x.jsonl", "/nowhere/x.jsonl"),
        ("calibration.data=", "calibration.data: expected a path"),
        ("calibration.samples=100000", "calibration"),
        ("model=/nowhere/model", "/nowhere/model"),
        ("prune.pruner=nothing", "prune.pruner"),
        ("prune.targets=[no_proj]", "no_proj"),
        ("no-equals-sign", "expected key=value"),
        ("prune.sparsity=[", "not YAML"),
    ],
)
def test_bad_input_is_one_message_and_no_output(workspace, tmp_path, setting, message):
    output = tmp_path / "out"
    assert message in fail("run", workspace / "recipe.yaml", "--output", output, "--set", setting)
    assert not output.exists()


def test_compare_needs_training_data(workspace):
    changes = ["--set", "train=", "--set", "method=prune_only", "--set", "compare=[lora]"]
    assert "method 'lora' needs a train section" in fail("run", workspace / "recipe.yaml", *changes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "/nowhere.yaml"], "/nowhere.yaml"),
        (["inspect", "/nowhere"], "/nowhere"),
        (["plan", "/nowhere.yaml"], "/nowhere.yaml"),
        (["eval", "/nowhere/model", "--data", "x.txt"], "/nowhere/model"),
        (["eval", "/nowhere/model"], "nothing to measure"),
    ],
)
def test_missing_things(arguments, message):
    assert message in fail(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["nonsense"], ["run", "r.yaml", "--nonsense"], ["eval", "m", "--length", "1"], ["prune", "m"]],
)
def test_usage_errors_exit_with_2(arguments):
    assert invoke(*arguments).exit_code == 2


def test_messages_are_printed_as_they_are(workspace, monkeypatch):
    def refuse(recipe, **options):
        raise LosaError("data [/red] [bold]x[/bold]: \\[odd]")

    monkeypatch.setattr(pipeline, "run_recipe", refuse)
    assert fail("run", workspace / "recipe.yaml") == "losa: data [/red] [bold]x[/bold]: \\[odd]\n"


def test_gpu_out_of_memory_says_what_helps(workspace, monkeypatch):
    OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})

    def exhaust(recipe, **options):
        raise OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "run_recipe", exhaust)
    assert "train.batch_size" in fail("run", workspace / "recipe.yaml")


def test_debug_shows_the_traceback(workspace, monkeypatch):
    def broken(recipe, **options):
        raise ValueError("a bug")

    monkeypatch.setattr(pipeline, "run_recipe", broken)
    assert isinstance(invoke("--debug", "run", workspace / "recipe.yaml").exception, ValueError)
    assert isinstance(invoke("--debug", "run", "/nowhere.yaml").exception, RecipeError)
    monkeypatch.setenv("LOSA_DEBUG", "1")
    assert isinstance(invoke("run", "/nowhere.yaml").exception, RecipeError)
    monkeypatch.setenv("LOSA_DEBUG", "0")
    fail("run", "/nowhere.yaml")


def test_version():
    assert succeed("--version") == f"losa {__version__}\n"


def child(code: str, *arguments, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1, **options)


@pytest.mark.subprocess
def test_ctrl_c(workspace):
    code = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
sys.modules["losa.run.pipeline"] = types.ModuleType("losa.run.pipeline")
def run_recipe(recipe, **options):
    print("running", flush=True)
    time.sleep(60)
sys.modules["losa.run.pipeline"].run_recipe = run_recipe
from losa.cli import main
main()
"""
    process = child(code, "run", workspace / "recipe.yaml")
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "losa: interrupted; --resume goes on\n"


@pytest.mark.subprocess
def test_help_is_quick():
    code = """
import sys, time
import losa.cli
try:
    losa.cli.main()
finally:
    heavy = {"torch", "transformers", "matplotlib", "pydantic", "datasets", "numpy"} & set(sys.modules)
    print(time.process_time(), sorted(heavy), file=sys.stderr)
"""
    out, err = child(code, "--help").communicate(timeout=60)
    seconds, heavy = err.strip().splitlines()[-1].split(" ", 1)
    assert "inspect" in out and heavy == "[]"
    assert float(seconds) < 1
