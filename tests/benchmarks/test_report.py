"""``python -m benchmarks report``: every prediction and question finds its rows, and answers come from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]
PREDICTIONS = json.loads(report.PREDICTIONS.read_text())
H100 = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.json"


def made_up() -> dict:
    """A result file with a row for each quantity that is asked for: a value of 6, and 3 where it divides by one."""
    benchmarks: dict[str, list[dict]] = {}

    def put(name: str, where: dict, field: str, value: float) -> None:
        rows = benchmarks.setdefault(name, [])
        row = next((row for row in rows if all(row.get(k) == v for k, v in where.items())), None)
        if row is None:
            rows.append(row := dict(where))
        row.setdefault(field, value)

    for quantity in (*PREDICTIONS["predictions"], *(q for q in PREDICTIONS["questions"] if "where" in q)):
        put(quantity["benchmark"], quantity["where"], quantity["field"], 6.0)
        if "to" in quantity or "to_field" in quantity:
            where = quantity["where"] | quantity.get("to", {})
            put(quantity["benchmark"], where, quantity.get("to_field", quantity["field"]), 3.0)
    for row in benchmarks["masked_lora"]:
        row["median_ms"] = 6.0
    for row in benchmarks["decode"]:
        row["model"] = "llama2-7b"
    for row in benchmarks["sparse_linear"]:
        row.setdefault("median_ms", 6.0)
    benchmarks["sparse_linear"].append(
        {"shape": "8x8", "pattern": "50%", "batch": 1, "implementation": "losa bf16, tiles", "failed": "error 2 > 1"}
    )
    benchmarks["sparse_linear, LOSA_WINDOW_LOT=4"] = [{"op": "sparse_linear", "median_ms": 0.5}]
    return {
        "machine": {"device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "torch": "2.11.0"},
        "origin": {"losa": "0.1.0", "commit": "0123456789", "date": "2026-01-01 00:00 UTC"},
        "steps": [{"step": "ncu", "status": "failed", "detail": "ERR_NVGPUCTRPERM"}],
        "smoke": [
            {"name": "gram 64 samples bf16", "status": "PASS"},
            {"name": "gram 256 samples bf16", "status": "FAIL", "error": 1.0, "allowed": 0.5},
        ],
        "failed_tests": {"gpu tests": ["tests/test_x.py::test_y"]},
        "benchmarks": benchmarks,
    }


def test_every_quantity_is_found(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made_up()))
    assert report.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("NVIDIA H200: driver 580.1, CUDA 13.0, torch 2.11.0, losa 0.1.0, commit 0123456789, ")
    assert "not measured" not in text and "not asked" not in text
    assert "| no: gram 256 samples bf16 |" in text and "- gram 256 samples bf16: error 1, allowed 0.5" in text
    assert "- step ncu: failed ERR_NVGPUCTRPERM" in text and "- gpu tests: tests/test_x.py::test_y" in text
    assert "| 8x8, 50%, batch 1 |  |  | error 2 > 1 |" in text and "### sparse_linear, LOSA_WINDOW_LOT=4" in text
    predictions = text.partition("### Predictions and goals")[2]
    for quantity in PREDICTIONS["predictions"]:
        assert f"| {quantity['what']} |" in predictions


def test_values_are_quotients_of_rows():
    rows = {"b": [{"op": "x", "way": 1, "ms": 8.0, "all": 16.0}, {"op": "x", "way": 2, "ms": 2.0}]}
    asked = {"benchmark": "b", "where": {"op": "x", "way": 1}, "field": "ms"}
    assert report.measured(asked, rows) == 8
    assert report.measured(asked | {"scale": 1000}, rows) == 8000
    assert report.measured(asked | {"to": {"way": 2}}, rows) == 4
    assert report.measured(asked | {"to_field": "all"}, rows) == 0.5
    assert report.measured(asked | {"to": {"way": 3}}, rows) is None
    assert report.measured(asked | {"benchmark": "c"}, rows) is None


def test_goals_are_reached_from_either_side():
    goals = {
        "card": "A",
        "predictions": [
            {"what": "a", "benchmark": "b", "where": {}, "field": "f", "goal": 2, "better": "more"},
            {"what": "c", "benchmark": "b", "where": {}, "field": "f", "goal": 2, "better": "less", "unit": "us"},
        ],
    }
    text = report.compared(goals, {"b": [{"f": 3.0}]}, {"machine": {"device": "B"}})
    assert "| a |  | 3 | 2 | yes |" in text and "| c |  | 3 us | 2 us | no |" in text and "This is an B." in text


@pytest.mark.skipif(not H100.exists(), reason="an installed package has no results")
def test_the_committed_file_of_an_older_commit():
    text = report.report([json.loads(H100.read_text())], PREDICTIONS)
    assert "commit 61d705f" in text and "| 4096x4096, 50%, batch 1 | 17 |" in text and "not measured" in text
