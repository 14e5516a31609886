"""The command line on mutated recipes, rows of text, manifests and safetensors headers: every fault is a sentence.

A command ends well (0), with a sentence of losa's own (1) or of the argument parser (2). Anything else is a fault of
losa: an exception that nobody expected, reported as such.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from losa.cli.app import app
from losa.cli.errors import UNEXPECTED
from losa.errors import LosaError
from losa.packed.directory import pack_directory
from tests.helpers.tiny import tiny_llama, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog and back again. "
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Examples of each family: together about two minutes on two cores.
EXAMPLES = 150
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Training text is read, and one method runs.
ONE_METHOD = ("--set", "compare=[]", "--set", "method=sparse_lora")
DEEP = json.loads("[" * 200 + "]" * 200)
WORDS = ["", " ", "x", "cpu", "meta", "cuda:99", "float16", "2:4", "9:1", "../..", "/", "~nobody", "name\0", "a" * 5000]
WORDS += ["builtin:pydoc/nothing", "re:(", "losa", "bitmask", "F32", "\U0001f98a", "-inf", "1" * 5000]
NUMBERS = [0, 1, -1, 3, 0.5, -0.5, 1e308, math.inf, math.nan, 2**31, 2**63, -(2**63) - 1, 10**30]
plain = st.sampled_from([None, True, False, *WORDS, *NUMBERS])
hostile = st.one_of(
    plain,
    st.lists(plain, max_size=3),
    st.dictionaries(st.sampled_from(WORDS[2:10]), plain, max_size=2),
    st.just(DEEP),
    st.text(max_size=8),
)
# Sizes a model is built from before anything can be compared with its weights: larger ones only take time.
small = hostile.filter(lambda value: not (isinstance(value, int) and abs(value) > 8))


def places(document, at: tuple = ()) -> list[tuple]:
    """Paths of all values of a JSON document, the whole one first."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(place for key, value in inside for place in places(value, (*at, key)))]


@st.composite
def mutated(draw, document, values=hostile):
    """``document`` with one or two values replaced, removed, doubled or put under another name."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from(places(document))) or (None,)
        if last is None:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        owner = document
        for key in parents:
            owner = owner[key]
        action = draw(st.sampled_from(["replace"] * 5 + ["remove", "add", "rename"]))
        if action == "replace":
            owner[last] = copy.deepcopy(draw(values))  # what a strategy gives is not to be changed
        elif action == "remove":
            del owner[last]
        elif isinstance(owner, list):
            owner.append(copy.deepcopy(owner[last]))
        else:
            owner[draw(st.sampled_from(WORDS))] = owner[last]
            if action == "rename":
                del owner[last]
    return document


@st.composite
def damaged(draw, data: bytes):
    """Bytes with a few of them changed, removed or repeated, or cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        stop = min(len(data), start + draw(st.sampled_from([1, 1, 2, 8, 100])))
        action = draw(st.sampled_from(["change", "remove", "repeat", "cut"]))
        if action == "cut":
            del data[start:]
        elif action == "remove":
            del data[start:stop]
        elif action == "repeat":
            data[start:start] = data[start:stop]
        else:
            data[start:stop] = draw(st.binary(min_size=1, max_size=4))
    return bytes(data)


def as_json(document) -> bytes:
    """Python's JSON: NaN, long integers and halves of surrogate pairs go through."""
    return json.dumps(document).encode()


def run(*arguments) -> str:
    """The exit code and what was printed; fails where no sentence stands."""
    root = logging.getLogger()
    before = list(root.handlers)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    root.handlers[:] = before  # basicConfig keeps the first run's stream, which is closed
    printed = f"losa {' '.join(str(argument)[:80] for argument in arguments)}: {result.output[-2000:]}"
    assert result.exception is None or isinstance(result.exception, SystemExit), printed
    assert result.exit_code in (0, 1, 2), printed
    if result.exit_code == 1:
        assert "losa: " in result.stderr and "Traceback" not in result.output, printed
        assert UNEXPECTED not in result.stderr, printed
    return result.output


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No progress bars; the environment is put back, and reports of errors go into no checkout."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    model = tiny_llama(layers=2, hidden=16)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            parameter.data[:, ::2] = 0
    model.save_pretrained(root / "model")
    tiny_tokenizer(TEMPLATE).save_pretrained(root / "model")
    pack_directory(root / "model", root / "packed")
    rows = [{"text": f"{i} {TEXT}"} for i in range(8)]
    rows += [{"instruction": "Say it.", "input": "", "output": TEXT} for _ in range(2)]
    turns = [("user", "Say it."), ("assistant", TEXT), ("user", "Again."), ("assistant", "No.")]
    rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(root) | {"compare": ["prune_only"], "method": "losa"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "LoSA" in run("run", root / "recipe.yaml", "--output", root / "sparse")
    return root


def recipe_for(root: Path) -> dict:
    data = str(root / "rows.jsonl")
    return {
        "model": str(root / "model"),
        "output": str(root / "out"),
        "device": "cpu",
        "dtype": "auto",
        "seed": 0,
        "method": "prune_only",
        "compare": [],
        "prune": {"sparsity": 0.5, "pruner": "wanda", "targets": ["q_proj", "down_proj"], "damping": 0.01},
        "calibration": {"data": data, "samples": 2, "length": 16, "cka_samples": 2, "batch_size": 1},
        "train": {"data": [{"path": data, "format": "auto"}], "length": 16, "batch_size": 2, "max_tokens": 64},
        "evaluate": {"data": data, "length": 32, "max_windows": 2},
        "allocation": {"mean_rank": 2, "rank_max": 4, "rates": "cka"},
        "rounds": {"count": 1, "schedule": "cubic"},
        "lora": {"rank": 2, "scaling": 2.0},
    }


def fresh(directory: Path) -> Path:
    """``directory`` without what the example before left in it."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return directory


@fuzzed
@given(data=st.data())
def test_recipes(workspace, tmp_path, data, monkeypatch):
    base = recipe_for(workspace) | {"output": str(tmp_path / "out")}
    monkeypatch.chdir(fresh(tmp_path))
    path = tmp_path / "recipe.yaml"
    if data.draw(st.booleans(), label="values"):
        settings = data.draw(mutated(base))
        path.write_bytes(as_json(settings))  # JSON is YAML
    else:
        path.write_bytes(data.draw(damaged(yaml.safe_dump(base).encode())))
    run(data.draw(st.sampled_from(["run", "run", "plan"])), path, "--set", f"output={tmp_path / 'out'}")


@fuzzed
@given(data=st.data())
def test_rows(workspace, tmp_path, data):
    lines = (workspace / "rows.jsonl").read_bytes().splitlines(keepends=True)
    path = fresh(tmp_path) / data.draw(st.sampled_from(["rows.jsonl", "rows.jsonl", "rows.json", "rows.txt"]))
    index = data.draw(st.integers(0, len(lines) - 1))
    if data.draw(st.booleans(), label="values"):
        lines[index] = as_json(data.draw(mutated(json.loads(lines[index])))) + b"\n"
    else:
        lines[index] = data.draw(damaged(lines[index]))
    path.write_bytes(b"".join(lines))
    command = data.draw(st.sampled_from(["eval", "eval", "prune", "run"]))
    if command == "eval":
        run("eval", workspace / "model", "--data", path, "--length", 16)
    elif command == "prune":
        arguments = ["--sparsity", 0.5, "--samples", 4, "--length", 16, "--output", tmp_path / "out"]
        run("prune", workspace / "model", "--data", path, *arguments)
    else:
        run("run", workspace / "recipe.yaml", "--data", path, "--output", tmp_path / "out", *ONE_METHOD)


def copied(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


@fuzzed
@given(data=st.data())
def test_manifests(workspace, tmp_path, data):
    kind, file = data.draw(
        st.sampled_from(
            [
                ("packed", "losa_packed.json"),
                ("packed", "losa_packed.json"),
                ("packed", "config.json"),
                ("model", "config.json"),
                ("model", "generation_config.json"),
                ("model", "tokenizer_config.json"),
                ("model", "tokenizer.json"),
                ("model", "model.safetensors.index.json"),
                ("sparse", "losa_config.json"),
            ]
        )
    )
    directory = copied(workspace / kind, fresh(tmp_path) / "copy")
    path = directory / file
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "model.safetensors"}}
    before = path.read_bytes() if path.exists() else as_json(index)
    if data.draw(st.booleans(), label="values"):
        path.write_bytes(as_json(data.draw(mutated(json.loads(before), small if file == "config.json" else hostile))))
    else:
        path.write_bytes(data.draw(damaged(before)))
    examine(workspace, directory, tmp_path, data)


@fuzzed
@given(data=st.data())
def test_safetensors_headers(workspace, tmp_path, data):
    kind = data.draw(st.sampled_from(["model", "packed"]))
    directory = copied(workspace / kind, fresh(tmp_path) / "copy")
    path = data.draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
    before = path.read_bytes()
    length = int.from_bytes(before[:8], "little")
    header, rest = before[8 : 8 + length], before[8 + length :]
    how = data.draw(st.sampled_from(["values", "values", "bytes", "file"]))
    if how == "values":
        header = as_json(data.draw(mutated(json.loads(header))))
    elif how == "bytes":
        header = data.draw(damaged(header))
    path.write_bytes(len(header).to_bytes(8, "little") + header + rest)
    if how == "file":
        path.write_bytes(data.draw(damaged(before)))
    examine(workspace, directory, tmp_path, data)


def examine(workspace: Path, directory: Path, tmp_path: Path, data) -> None:
    """One of the commands that read a checkpoint."""
    output = tmp_path / "out"
    text = ("--data", workspace / "rows.jsonl", "--length", 16)
    commands = [
        ("inspect", directory),
        ("inspect", directory, "--figures", output),
        ("pack", directory, "--output", output),
        ("unpack", directory, "--output", output),
        ("generate", directory, "--prompt", "The quick", "--max-new-tokens", 2),
        ("generate", directory, "--prompt", "The quick", "--max-new-tokens", 2, "--dense", "--chat"),
        ("eval", directory, *text),
        ("prune", directory, *text, "--samples", 2, "--sparsity", 0.5, "--output", output),
    ]
    run(*data.draw(st.sampled_from(commands)))


def test_the_check_can_fail(monkeypatch):
    """An exception that nobody expected is seen as one."""

    def broken(*arguments, **options):
        raise ZeroDivisionError("nobody expected this")

    monkeypatch.setattr("losa.output.inspection.inspect_directory", broken)
    with pytest.raises(AssertionError, match="nobody expected this"):
        run("inspect", "anything")

    def refusing(path):
        raise LosaError("a sentence")

    monkeypatch.setattr("losa.output.inspection.inspect_directory", refusing)
    assert "a sentence" in run("inspect", "anything")
