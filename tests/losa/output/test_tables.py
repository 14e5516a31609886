"""Tables, figures and their CSV, the model card, and inspecting any directory."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from losa.errors import OutputError
from losa.output.card import model_card
from losa.output.figures import write_figures
from losa.output.inspection import inspect_directory
from losa.output.tables import blocks_table, plain_text, results_table, rounds_table, show_table, zeros_table
from losa.record import MaskRecord, MethodResult, RoundRecord, RunRecord
from tests.helpers.tiny import tiny_llama

BLOCKS = 5


def make_record(method="losa", rounds=3, blocks=BLOCKS, **changes) -> RunRecord:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).tolist()

    made = [
        RoundRecord(
            index=t,
            target_sparsity=0.7 * t / rounds,
            mean_rank=5.0 + t,
            sparsity=numbers(blocks),
            ranks=[t + i % 4 for i in range(blocks)],
            errors=numbers(blocks),
            importance=numbers(blocks),
            similarity=numbers(blocks, blocks),
            train_steps=10 * t,
            train_tokens=100 * t,
            train_loss=3.25 - 0.125 * t,
            perplexity=20.125 * t,
            seconds={"rates": 1.5, "train": 20.25},
        )
        for t in range(1, rounds + 1)
    ]
    record = RunRecord(
        losa_version="0.1.0",
        method=method,
        recipe={
            "model": "maker/small-1b",
            "output": "secret-place",
            "prune": {"pruner": "wanda", "sparsity": 0.7, "pattern": None},
            "allocation": {"error": "relative"},
            "train": {"learning_rate": 2e-4},
        },
        model="maker/small-1b",
        blocks=[f"model.layers.{i}" for i in range(blocks)],
        environment={"torch": "2.13.0", "device": "x86_64"},
        rounds=made,
        results=[
            MethodResult("dense", 22.75, 0.0, 3, 1000, 5.0),
            MethodResult("lora", 240.5, 0.7, 700, 1000, 50.0, False, 113.25, 600, 99),
            MethodResult("losa", 104.75, 0.7, 700, 1000, 60.0, True, None, 600, 99),
        ],
        masks={"model.layers.0.mlp.up_proj": MaskRecord("0" * 64, [20, 50], 300)},
        evaluation={
            "data": {"path": "wikitext", "subset": "wikitext-2-raw-v1", "split": "test"},
            "length": 512,
            "windows": 48,
            "tokens": 24576,
        },
        seconds=600.0,
    )
    for key, value in changes.items():
        setattr(record, key, value)
    return record


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_figures_and_their_numbers(tmp_path):
    record = make_record()
    written = write_figures(record, tmp_path / "figures")
    expected = ["sparsity", "ranks", "errors", "cka", "perplexity", "methods"]
    assert sorted(p.name for p in written) == sorted(f"{name}.{kind}" for name in expected for kind in ("png", "csv"))
    assert sorted(written) == sorted((tmp_path / "figures").iterdir())
    for name in expected:
        with Image.open(tmp_path / "figures" / f"{name}.png") as picture:
            grey = picture.convert("L")
            assert min(grey.size) > 150 and grey.getextrema()[0] < 60 and grey.getextrema()[1] == 255

    for name, field in (("sparsity", "sparsity"), ("ranks", "ranks"), ("errors", "errors")):
        rows = read_csv(tmp_path / "figures" / f"{name}.csv")
        assert [int(row["block"]) for row in rows] == list(range(BLOCKS))
        for r in record.rounds:
            assert [float(row[f"round {r.index}"]) for row in rows] == getattr(r, field)
    rows = read_csv(tmp_path / "figures" / "cka.csv")
    for r in (record.rounds[0], record.rounds[-1]):
        found = {(int(x["block_i"]), int(x["block_j"])): float(x["cka"]) for x in rows if int(x["round"]) == r.index}
        assert found == {(i, j): r.similarity[i][j] for i in range(BLOCKS) for j in range(BLOCKS)}
    assert len(rows) == 2 * BLOCKS**2
    rows = read_csv(tmp_path / "figures" / "perplexity.csv")
    own = [(int(x["round"]), float(x["sparsity"]), float(x["perplexity"])) for x in rows if x["method"] == "losa"]
    assert own == [(r.index, r.target_sparsity, r.perplexity) for r in record.rounds]
    others = {x["method"]: float(x["perplexity"]) for x in rows if x["method"] != "losa"}
    assert others == {"dense": 22.75, "lora": 113.25}
    rows = [(x["method"], float(x["perplexity"])) for x in read_csv(tmp_path / "figures" / "methods.csv")]
    assert rows == [("lora", 113.25), ("losa", 104.75), ("dense", 22.75)]


def test_figures_only_of_what_was_measured(tmp_path):
    bare = [RoundRecord(1, 0.5, 8.0, [0.5, 0.5], [8, 8])]
    record = make_record(method="prune_only", rounds=1, blocks=2)
    record.rounds, record.results = bare, [MethodResult("prune_only", 30.0, 0.5, 5, 10, 1.0)]
    assert [p.name for p in write_figures(record, tmp_path / "a")] == ["sparsity.png", "sparsity.csv"]
    record.rounds = []
    assert write_figures(record, tmp_path / "b") == []


@pytest.mark.parametrize("rounds, blocks", [(1, 1), (1, 2), (2, 60)])
def test_figures_of_odd_sizes(tmp_path, rounds, blocks):
    record = make_record(rounds=rounds, blocks=blocks)
    record.rounds[0].errors = [0.0] * blocks
    record.rounds[-1].perplexity = float("inf")
    assert len(write_figures(record, tmp_path)) == 12


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path):
    import matplotlib
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    write_figures(make_record(rounds=1), tmp_path)
    assert matplotlib.get_backend() == before and pyplot.get_fignums() == []


def test_figures_into_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_figures(make_record(), tmp_path / "file")


def cells(table) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in zip(*(column._cells for column in table.columns), strict=True)]


def test_tables_hold_the_record():
    record = make_record()
    results = cells(results_table(record))
    assert results[0] == ["dense", "22.75", "0.00 %", "3", "0", "5 s"]
    assert results[1][1] == "113.25 (merged: 240.50)"
    assert results[2] == ["LoSA", "104.75", "70.00 %", "700", "600", "60 s"]
    rounds = cells(rounds_table(record))
    assert [row[0] for row in rounds] == ["1", "2", "3"]
    assert rounds[2][1:2] + rounds[2][3:] == ["70.00 %", "4.20", "3..6", "30", "2.875", "60.38", "22 s"]
    assert str(rounds_table(record).caption) == "time by stage: rates 4.5 s, train 60.8 s"
    blocks = cells(blocks_table(record))
    assert [row[0] for row in blocks] == record.blocks and [row[2] for row in blocks] == ["3", "4", "5", "6", "3"]


def test_tables_without_numbers():
    record = make_record(method="prune_only", evaluation=None, results=[MethodResult("dense", None, 0, 0, 9, 0.0)])
    record.rounds = [RoundRecord(1, 0.5, 8.0, [0.5] * BLOCKS, [8] * BLOCKS, keep_n=[2] * BLOCKS, m=4)]
    assert cells(results_table(record))[0][1] == "-"
    assert "no text to evaluate on" in str(results_table(record).title)
    assert cells(rounds_table(record))[0][2:] == ["50.0 %", "-", "-", "0", "-", "-", "0 s"]
    assert cells(blocks_table(record))[0][1:] == ["50.00 %", "-", "-", "-", "2:4"]
    record.rounds = []
    assert cells(blocks_table(record)) == []


def test_plain_text_is_ascii_and_never_cut():
    record = make_record(model="a/path [with] brackets/" + 40 * "long-name/")
    text = plain_text(results_table(record))
    assert text.isascii() and record.model in text.splitlines()[0]
    assert "| LoSA" in text and "113.25 (merged: 240.50)" in text
    file = io.StringIO()
    show_table(results_table(record), Console(file=file, width=40))
    assert file.getvalue().strip() == text.strip()


def test_terminal_gets_the_drawn_table():
    file = io.StringIO()
    show_table(rounds_table(make_record()), Console(file=file, width=120, force_terminal=True))
    assert "─" in file.getvalue() and "\x1b[" in file.getvalue()


def test_model_card():
    record = make_record()
    text = model_card(record)
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "maker/small-1b" and front["library_name"] == "transformers"
    assert "# small-1b, 70 % sparse (LoSA)" in body
    assert "700 of 1,000 weights in 1 matrices are pruned (70.00 %)" in body
    assert "wikitext wikitext-2-raw-v1 test, 48 non-overlapping windows of 512 tokens (24,576 in all)" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == {key: value for key, value in record.recipe.items() if key != "output"}
    lines = body.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("|--"))
    assert lines[rule].count("|") == lines[rule - 1].count("|") == lines[rule + 1].count("|")
    assert all(cell in body for cell in ("104.75", "22.75", "113.25 (merged: 240.50)", "2.875"))
    assert "secret-place" not in text and "## Limits" in body and "## Licence" in body


def test_model_card_of_a_pattern_and_a_local_model(tmp_path):
    record = make_record(method="prune_only", model=str(tmp_path))
    record.recipe["prune"] = {"pruner": "wanda", "sparsity": None, "pattern": "2:4"}
    text = model_card(record)
    assert "base_model" not in text and f"# {tmp_path.name}, 2:4 (kept:of) sparse (pruned only)" in text
    assert "without any training" in text


def test_inspect_measures_any_directory(tmp_path):
    model = tiny_llama(layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:8] = 0.0
        model.model.layers[1].mlp.up_proj.weight[8, :4] = -0.0
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = inspect_directory(tmp_path)
    assert found.record is None and found.lost_zeros == []
    assert {t.name for t in found.tensors} == {
        name for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2
    }
    sizes = {t.name: (t.shape, t.zeros, t.total) for t in found.tensors}
    assert sizes["model.layers.1.mlp.up_proj.weight"] == ((64, 32), 8 * 32 + 4, 64 * 32)
    assert sum(t.zeros for t in found.tensors) == 8 * 32 + 4
    assert found.sparsity == pytest.approx(260 / sum(t.total for t in found.tensors))
    rows = cells(zeros_table(found))
    assert [row[0] for row in rows] == ["model.layers.0", "model.layers.1"] and rows[1][3] == "260"


def test_inspect_orders_blocks_by_number(tmp_path):
    names = [f"h.{i}.attn.c.weight" for i in (10, 2, 0)] + ["vision.h.1.x.weight", "wte.weight", "h.0.ln.weight"]
    tensors = {name: torch.ones(2, 2) for name in names}
    tensors["h.0.ln.weight"] = torch.ones(2)
    tensors["h.0.q.weight"] = torch.ones(2, 2, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    rows = cells(zeros_table(inspect_directory(tmp_path)))
    assert [row[0] for row in rows] == ["h.0", "h.2", "h.10", "vision.h.1"]
    assert rows[0][1:] == ["1", "4", "0", "0.00 %"]


def test_inspect_finds_lost_zeros(tmp_path):
    weight = torch.ones(20, 50)
    weight[:14] = 0
    (tmp_path / "losa_config.json").write_text(json.dumps(make_record().to_dict()))
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: weight}, tmp_path / "model.safetensors")
    found = inspect_directory(tmp_path)
    assert found.record == make_record() and found.lost_zeros == []
    weight[0, 0] = 1e-3
    save_file({name: weight}, tmp_path / "model.safetensors")
    found = inspect_directory(tmp_path)
    assert found.lost_zeros == [name]
    assert name in str(zeros_table(found).caption)


def test_inspect_says_what_is_wrong(tmp_path):
    with pytest.raises(OutputError, match="no such directory"):
        inspect_directory(tmp_path / "absent")
    with pytest.raises(OutputError, match="no safetensors files"):
        inspect_directory(tmp_path)
    save_file({"wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match="no floating-point matrix"):
        inspect_directory(tmp_path)
    (tmp_path / "losa_config.json").write_text('{"method": 1}')
    with pytest.raises(OutputError, match="losa_config.json: damaged"):
        inspect_directory(tmp_path)
    (tmp_path / "losa_config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(OutputError, match=r"model.safetensors: cannot be read"):
        inspect_directory(tmp_path)


def at(path, value):
    """An edit of a record's dict: ``path`` set to ``value``."""

    def edit(data):
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return data

    return edit


WRONG_RECORDS = {
    "a list": lambda data: [data],
    "no model": lambda data: {key: value for key, value in data.items() if key != "model"},
    "unknown": lambda data: data | {"colour": "red"},
    "recipe": at(["recipe"], None),
    "allocation": at(["recipe", "allocation"], [1]),
    "error's name": at(["recipe", "allocation", "error"], ["relative"]),
    "blocks": at(["blocks"], "model.layers.0"),
    "no blocks": at(["blocks"], []),
    "rounds": at(["rounds"], {"1": 2}),
    "round": at(["rounds", 1], 7),
    "seconds": at(["rounds", 0, "seconds"], None),
    "a second": at(["rounds", 0, "seconds"], {"train": "1"}),
    "sparsity": at(["rounds", 0, "sparsity"], []),
    "ranks": at(["rounds", 1, "ranks"], []),
    "ranks of text": at(["rounds", 1, "ranks"], ["8"] * BLOCKS),
    "ranks of fractions": at(["rounds", 1, "ranks"], [8.5] * BLOCKS),
    "errors": at(["rounds", 2, "errors"], [0.1]),
    "keep_n": at(["rounds", 2, "keep_n"], [2]),
    "keep_n without m": at(["rounds", 2, "keep_n"], [2] * BLOCKS),
    "similarity": at(["rounds", 0, "similarity"], "high"),
    "a row of similarity": at(["rounds", 0, "similarity", 1], [1.0]),
    "importance": at(["rounds", 0, "importance"], [None] * BLOCKS),
    "perplexity": at(["rounds", 0, "perplexity"], "22"),
    "perplexity of a result": at(["results", 1, "perplexity"], [22.0]),
    "zeros": at(["results", 1, "zeros"], 3.5),
    "truth": at(["results", 1, "prunable"], True),
    "mask": at(["masks"], {"x": {"sha256": "", "shape": [4], "kept": 3}}),
    "evaluation": at(["evaluation"], {}),
    "evaluation's number": at(["evaluation"], 3),
    "evaluation's data": at(["evaluation", "data"], {"path": 3}),
    "windows": at(["evaluation", "windows"], "48"),
    "time": at(["seconds"], None),
    "huge": at(["results", 1, "zeros"], 10**400),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_record_that_is_wrong_is_named(name, tmp_path):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(20, 50)}, tmp_path / "model.safetensors")
    data = json.loads(json.dumps(make_record().to_dict()))
    (tmp_path / "losa_config.json").write_text(json.dumps(WRONG_RECORDS[name](data)))
    with pytest.raises(OutputError, match="losa_config.json: damaged"):
        inspect_directory(tmp_path)


def test_records_of_any_method_are_read_back(tmp_path):
    pruned = make_record(method="prune_only", evaluation=None, masks={})
    for r in pruned.rounds:
        r.ranks, r.errors, r.similarity, r.importance, r.train_loss = [], None, None, None, None
        r.keep_n, r.m, r.perplexity = [2] * BLOCKS, 4, float("inf")
    for record in (make_record(), pruned, make_record(rounds=0)):
        read = RunRecord.from_dict(json.loads(json.dumps(record.to_dict())))
        assert read == record
        for table in (blocks_table, rounds_table, results_table):
            plain_text(table(read))
    assert write_figures(RunRecord.from_dict(pruned.to_dict()), tmp_path / "figures")
