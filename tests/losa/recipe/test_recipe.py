"""Recipes: what is refused, and how the message reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from losa.errors import RecipeError
from losa.recipe.reading import load_recipe, parse_recipe, read_settings, read_yaml

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


def settings(**changes) -> dict:
    base = {
        "model": "somewhere",
        "output": "out",
        "prune": {"sparsity": 0.5},
        "calibration": {"data": "c.txt"},
        "train": {"data": ["a.jsonl", {"path": "b", "limit": 3}]},
    }
    return base | changes


def test_defaults_are_the_papers():
    recipe = parse_recipe(settings())
    assert (recipe.rounds.count, recipe.rounds.schedule) == (5, "cubic")
    assert (recipe.allocation.mean_rank, recipe.allocation.rank_max) == (6, 16)
    assert (recipe.lora.scaling, recipe.lora.rank, recipe.lora.dropout) == (2.0, 8, 0.0)
    assert (recipe.train.learning_rate, recipe.train.warmup, recipe.train.max_grad_norm) == (2e-4, 0.3, 0.3)
    assert [s.path for s in recipe.train.data] == ["a.jsonl", "b"] and recipe.train.data[1].limit == 3
    assert recipe.calibration.data[0].path == "c.txt"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.method == ("prune_only" if "prune" in path.stem else "losa") and recipe.evaluate is not None
    assert recipe.output == Path("runs") / recipe.output.name


def test_examples_are_listed():
    assert {"smollm2-cpu", "llama2-7b-wanda70", "opt-13b-wanda50"} <= {p.stem for p in EXAMPLES}
    listed = (EXAMPLES[0].parent / "README.md").read_text()
    assert all(f"({path.name})" in listed for path in EXAMPLES)


def leaves(settings, prefix=""):
    """Dotted names of all settings; a data source counts as one."""
    for key, value in settings.items():
        section = isinstance(value, dict) and key != "data"
        yield from leaves(value, f"{prefix}{key}.") if section else [prefix + key]


def test_the_complete_example_has_every_setting():
    path = EXAMPLES[0].parent / "every-setting.yaml"
    written = read_settings(path)
    dumped = load_recipe(path).model_dump(mode="json")
    assert list(leaves(written)) == list(leaves(dumped)), "in the order of the sections and their keys"
    assert sorted(written["calibration"]["data"]) == sorted(dumped["calibration"]["data"][0])
    short = load_recipe(EXAMPLES[0].parent / "llama2-7b-wanda70.yaml").model_dump(mode="json")
    assert dumped | {"output": None} == short | {"output": None}


def test_gpu_examples_hold_no_defaults():
    for path in EXAMPLES:
        if path.stem == "every-setting" or path.stem.startswith("smollm2"):
            continue
        written = read_settings(path)
        whole = load_recipe(path).model_dump(mode="json")
        for name in list(leaves(written)):
            *parents, leaf = name.split(".")
            section = written
            for parent in parents:
                section = section[parent]
            left_out = section.pop(leaf)
            try:
                same = parse_recipe(written).model_dump(mode="json") == whole
            except RecipeError:
                same = False
            assert not same, f"{path.name}: {name} is the default"
            section[leaf] = left_out


def test_the_7b_example_has_the_papers_settings():
    recipe = load_recipe(next(path for path in EXAMPLES if path.stem == "llama2-7b-wanda70"))
    assert (recipe.prune.pruner, recipe.prune.sparsity, recipe.rounds.count) == ("wanda", 0.7, 5)
    assert (recipe.allocation.mean_rank, recipe.allocation.rank_growth, recipe.allocation.rank_max) == (6, 1, 16)
    assert (recipe.lora.scaling, recipe.lora.dropout, recipe.lora.rank) == (2.0, 0.1, 8)
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.cka_samples) == (128, 2048, 64)
    train = recipe.train
    assert (train.data[0].limit, train.round_share, train.batch_size, train.length) == (10_000, 0.1, 8, 1024)
    assert (train.learning_rate, train.warmup, train.weight_decay, train.max_grad_norm) == (2e-4, 0.3, 1e-3, 0.3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": 0.5}, "sparsity: unknown key"),
        ({"prune": {"sparsity": 0.5, "prunner": "wanda"}}, "prune.prunner: unknown key; did you mean prune.pruner?"),
        ({"sparsity": 0.5}, "sparsity: unknown key; did you mean prune.sparsity?"),
        ({"nothing_like_it": 0.5}, "nothing_like_it: unknown key$"),
        ({"prune": {"sparsity": 0}}, "prune.sparsity: .*greater than 0, got 0"),
        ({"train": {"data": "t", "norms": True}}, "train.norms: expected a number, got true"),
        ({"rounds": {"count": True}}, "rounds.count: expected a number, got true"),
        ({"prune": {"sparsity": 0.96}}, "prune.sparsity: .*0.95, got 0.96"),
        ({"prune": {"sparsity": 1}}, "prune.sparsity"),
        ({"prune": {}}, "exactly one of prune.sparsity and prune.pattern"),
        ({"prune": {"sparsity": 0.5, "pattern": "2:4"}}, "exactly one of"),
        ({"prune": {"pattern": "4:4"}}, "0 < keep_n < m"),
        ({"prune": {"pattern": "2-4"}}, "prune.pattern"),
        ({"prune": {"pattern": "1:32"}}, "exceeds sparsity"),
        ({"prune": {"sparsity": 0.5, "mixed": True}}, "prune.mixed needs"),
        ({"allocation": {"mean_rank": 20}}, "rank_min <= mean_rank <= rank_max"),
        ({"allocation": {"rank_max": 200}}, "allocation.rank_max"),
        ({"method": "magic"}, "method"),
        ({"train": None}, "train: method 'losa' needs"),
        ({"method": "prune_only", "compare": ["lora"], "train": None}, "method 'lora' needs"),
        ({"calibration": {"data": []}}, "calibration.data"),
        ({"calibration": {"data": None}}, "calibration.data: expected a path"),
        ({"calibration": {"data": 5}}, "calibration.data: expected a path.*got 5"),
        ({"calibration": {"data": [{"path": "x", "txt": 1}]}}, "calibration.data.0.txt: unknown key"),
        ({"calibration": {}}, "calibration.data: missing"),
        ({"output": None}, "output: expected a directory's name, got None"),
        ({"output": ["a"]}, r"output: expected a directory's name, got \['a'\]"),
        ({"calibration": "c.txt"}, "calibration: expected a section of settings .*got 'c.txt'"),
        ({"calibration": {"data": "c.txt", "samples": 1}}, "calibration.samples: .*at least 2, got 1"),
        ({"calibration": {"data": "c.txt", "cka_samples": 257}}, "calibration.cka_samples: .*256, got 257"),
        ({"train": {"data": "t", "learning_rate": float("inf")}}, "train.learning_rate: .*finite"),
        ({"prune": {"sparsity": float("nan")}}, "prune.sparsity"),
        ({"prune": {"sparsity": 0.5, "targets": []}}, r"prune.targets: expected names.*got \[\]"),
        ({"prune": {"sparsity": 0.5, "targets": [3]}}, "prune.targets: expected names"),
        ({"seed": -1}, "seed: .*got -1"),
        ({"model": ""}, "model"),
        ({"rounds": {"count": 0}}, "rounds.count"),
        ({"distributed": {"mode": "ddp", "cpu_offload": True}}, "distributed.cpu_offload: expected mode fsdp or hsdp"),
        ({"distributed": {"mode": "ddp", "reshard_after_forward": False}}, "reshard_after_forward: expected mode"),
        ({"distributed": {"mode": "ddp", "activation_checkpointing": False}}, "checkpointing: expected mode fsdp"),
        ({"distributed": {"shard_size": 2}}, "distributed.shard_size: expected mode hsdp, got auto"),
        (
            {"method": "lora", "reconstruct": {}},
            r"reconstruct: expected a method .*\(losa, sparse_lora\), got lora",
        ),
        (
            {"method": "adalora", "lora": {"rank": 86}},
            "lora.rank: expected at most 85 .* 1.5 times .* got 86",
        ),
        ({"reconstruct": {"steps": 0}}, "reconstruct.steps: .*greater than or equal to 1, got 0"),
    ],
)
def test_refusals_name_the_key(change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(settings(**change))


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    "line, message",
    [
        ("seed: " + "[" * 600 + "]" * 600, "not valid YAML: nested too deep"),
        ("seed: " + "7" * 5000, "seed: .*integer"),
        ("seed: 0x" + "f" * 5000, "seed: .*got an integer of 20000 bits"),
        ("seed: !!int seven", "seed: .*got 'seven'"),
        ("lora: {scaling: " + "7" * 5000 + "}", "lora.scaling: "),
        ("deterministic: !!bool maybe", "not valid YAML"),
        ("device: meta", "device: expected auto, cpu, cuda, cuda:1, ...; got 'meta'"),
        ("device: 'meta:0'", "device: expected auto"),
        ("device: 'cuda:1234567890'", "device: expected auto"),
        ("output: " + "x" * 300, "output: File name too long: 'x"),
        ("output: " + "x" * 245, "output: File name too long: 'x"),
        ('output: "a\\0b"', "output: not a path: "),
        ("output: ~no_such_user/x", "output: not a directory's name: '~no_such_user/x'"),
        ("output: .", "output: not a directory's name: '.'"),
        ("model: /" + "m" * 300, "model: File name too long"),
        ('model: "m\\0"', "model: not a path"),
        ('model: "m\\ud83d"', "model: .*unicode"),
        ("calibration: {data: " + "c" * 300 + ".txt}", "calibration.data: File name too long"),
        ('evaluate: {data: "e\\0.txt"}', "evaluate.data: not a path"),
        ('train: {data: ["t.txt", "\\ud83d.txt"]}', "train.data: not a path"),
        ("on: 1", "1: Keys should be strings, got True"),
        ("lora: {1: 2, 2026-01-01: 3}", r"lora.1: Keys should be strings(.|\n)*lora.2026-01-01: unknown key"),
        ("~: 1", "None: Keys should be strings"),
        ("\tseed: 1", "not valid YAML"),
        ("k" * 900 + ": 1", "k{60}...: unknown key"),
        ("rounds: {count: 100000000}", "rounds.count: .*1000"),
        ("calibration: {data: c.txt, samples: 99999999999}", "calibration.samples: "),
        ("lora: &here {rank: *here}", "lora.rank: "),
        ("compare: &here [*here]", "compare.0: "),
        (BOMB + "compare: *l", "a: unknown key(.|\n)*compare.0: |compare.0: (.|\n)*a: unknown key"),
        (BOMB + "calibration: {data: *l}", "calibration.data.0: expected a section"),
        ("".join(f"key{i}: 1\n" for i in range(500)), r"500 problem(.|\n)*key19: unknown key\n  \.\.\.$"),
    ],
)
def test_settings_that_nothing_can_use_are_named_shortly(tmp_path, line, message):
    keys = {part.split(":")[0] for part in line.splitlines()}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in settings().items() if k not in keys}) + line + "\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 3000


def test_several_problems_are_all_named():
    with pytest.raises(RecipeError, match="2 problem") as caught:
        parse_recipe(settings(prune={"sparsity": 2}, typo=1))
    assert "prune.sparsity" in str(caught.value) and "typo" in str(caught.value)


def test_long_values_are_cut_short():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(settings(model=list(range(1000))))
    assert len(str(caught.value)) < 200


def test_targets_and_output():
    recipe = parse_recipe(settings(prune={"sparsity": 0.5, "targets": "re:mlp"}, output="~/x"))
    assert recipe.prune.targets == "re:mlp" and recipe.output == Path.home() / "x"
    assert parse_recipe(settings(prune={"sparsity": 0.5, "targets": ["up_proj"]})).prune.targets == ["up_proj"]


def test_one_sample_is_enough_without_similarity():
    calibration = {"data": "c.txt", "samples": 1}
    assert parse_recipe(settings(calibration=calibration, method="lora")).calibration.samples == 1
    assert parse_recipe(settings(calibration=calibration, allocation={"rates": "uniform"})).calibration.samples == 1


@pytest.mark.parametrize("key", ["model", "calibration.data", "train.data", "evaluate.data"])
def test_output_must_not_hold_what_the_run_reads(tmp_path, key):
    (tmp_path / "inputs").mkdir()
    inside = str(tmp_path / "inputs")
    section, _, leaf = key.partition(".")
    change = {section: {leaf: inside} if leaf else inside}
    with pytest.raises(RecipeError, match=f"output: .* holds {key} "):
        parse_recipe(settings(**change, output=str(tmp_path)))
    with pytest.raises(RecipeError, match=f"output: .* holds {key} "):
        parse_recipe(settings(**change, output=str(tmp_path / "x" / ".." / "inputs")))
    (tmp_path / "out.work").symlink_to(tmp_path / "inputs")
    with pytest.raises(RecipeError, match=rf"output: .*out\.work' holds {key} "):
        parse_recipe(settings(**change, output=str(tmp_path / "out")))
    assert parse_recipe(settings(**change, output=str(tmp_path / "inputs" / "new"))).output.name == "new"


def test_yaml_reads_what_people_mean():
    text = (
        "{pattern: 2:4, rate: 1e-3, share: 0.7, count: 16, hex: 0x10, big: 10_000, date: 2026-01-01, none: , yes: true}"
    )
    assert read_yaml(text) == {
        "pattern": "2:4",
        "rate": 0.001,
        "share": 0.7,
        "count": 16,
        "hex": 16,
        "big": 10000,
        "date": "2026-01-01",
        "none": None,
        True: True,
    }
    assert read_yaml("2:4") == "2:4" and read_yaml("-1.5e+3") == -1500.0


def test_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(settings()))
    recipe = load_recipe(path, {"prune.sparsity": 0.25, "rounds.count": 2, "seed": 7})
    assert (recipe.prune.sparsity, recipe.rounds.count, recipe.seed) == (0.25, 2, 7)
    with pytest.raises(RecipeError, match="'model' is not a section"):
        load_recipe(path, {"model.name": 1})


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read"),
        ("a: [", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("seed: 1\nseed: 2", "not valid YAML: repeated key 'seed'"),
        ("prune: {sparsity: 0.5, sparsity: 0.7}", "repeated key 'sparsity'"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
