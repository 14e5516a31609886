"""examples/save_rows.py: what it saves is what the recipe reads."""

from __future__ import annotations

import runpy

import pytest

from losa.cli.recipes import recipe_from
from losa.data.row_files import Row
from losa.data.row_formats import row_format
from losa.data.sources import read_rows
from losa.recipe.reading import load_recipe
from losa.recipe.sources import DataSource
from tests.helpers.processes import ROOT

TRAINING = "train: {data: [{path: train.txt}, {path: more.jsonl, limit: 1}]}\n"


@pytest.mark.parametrize("training", [TRAINING, ""], ids=["trains", "prunes"])
def test_a_run_reads_what_was_saved(tmp_path, monkeypatch, training):
    monkeypatch.chdir(tmp_path)
    for name in ("calibration", "train", "heldout"):
        (tmp_path / f"{name}.txt").write_text(f"{name}, \u00e9")
    (tmp_path / "more.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"text": "beyond the limit"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\noutput: o\nmethod: prune_only\nprune: {sparsity: 0.5}\ncalibration: {data: calibration.txt}\n"
        f"evaluate: {{data: heldout.txt}}\n{training}"
    )
    runpy.run_path(str(ROOT / "examples/save_rows.py"))["save_rows"](recipe, tmp_path / "saved")
    before, after = load_recipe(recipe), recipe_from(recipe, None, data=tmp_path / "saved")
    sections = [(before.calibration.data, after.calibration.data), ([before.evaluate.data], [after.evaluate.data])]
    if training:
        sections.append((before.train.data, after.train.data))
    assert (after.train is None) == (not training)
    for stated, saved in sections:
        assert all("saved" in source.path for source in saved)
        assert [row for s in saved for row in read_rows(s)] == [row for s in stated for row in read_rows(s)]


@pytest.mark.parametrize(
    "source, row, saved",
    [
        ({}, {"text": "t", "url": "u"}, {"text": "t"}),
        ({"text_field": "content"}, {"content": "t"}, {"text": "t"}),
        ({"format": "text"}, {"text": "t", "instruction": "i", "output": "o"}, {"text": "t"}),
        ({}, {"instruction": "i", "output": "o"}, {"instruction": "i", "output": "o"}),
        (
            {"format": "alpaca"},
            {"messages": [], "instruction": "i", "output": "o"},
            {"instruction": "i", "output": "o"},
        ),
        ({"format": "messages"}, {"messages": [], "text": "t"}, {"messages": [], "text": "t"}),
    ],
)
def test_rows_are_read_as_the_source_says(source, row, saved):
    as_read = runpy.run_path(str(ROOT / "examples/save_rows.py"))["as_read"]
    stated = DataSource(path="rows.jsonl", **source)
    assert as_read(row, stated) == saved
    # Without the recipe's format and field.
    assert row_format(Row("line 1", saved), DataSource(path="saved.jsonl")) == row_format(Row("line 1", row), stated)
