"""Benchmarks run, gate on correctness, and write rows that say where they were measured."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as entry
from benchmarks import bitmask, quality


def test_names_are_listed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert entry.main() == 2
    assert "bitmask" in capsys.readouterr().err


def test_bitmask_rows(tmp_path):
    bitmask.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    document = json.loads((tmp_path / "rows.json").read_text())
    assert document["machine"]["torch"] and {r["op"] for r in document["rows"]} == {"pack", "unpack"}
    assert all(r["median_ms"] >= r["min_ms"] > 0 for r in document["rows"])


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(bitmask, "unpack_mask", lambda packed, n: packed.new_zeros(packed.shape[0], n).bool())
    with pytest.raises(SystemExit, match="wrong kernel"):
        bitmask.main(["--quick", "--device", "cpu"])


def test_quality_runs_what_is_asked_for():
    keys = [job.key for job in (*quality.tuning_jobs(), *quality.final_jobs(), *quality.ablation_jobs())]
    assert len(set(keys)) == len(keys)
    seeds = [j for j in quality.final_jobs() if j.pruner == "wanda" and j.sparsity == 0.7]
    assert {(j.method, j.seed) for j in seeds} == {
        (m, s) for m in ("prune_only", "losa", "lora", "sparse_lora") for s in range(3)
    }


def test_quality_table_and_tuning():
    rate = quality.GRID["lora"][1]
    runs = {
        quality.Job("lora", learning_rate=lr, tuning=True).key: {"perplexity": 1, "perplexity_unmerged": abs(lr - rate)}
        for lr in quality.GRID["lora"]
    }
    assert quality.tuned_rate(runs, "lora") == rate
    for seed, value in enumerate((10.0, 14.0)):
        runs[quality.Job("losa", seed=seed).key] = {"perplexity": value, "perplexity_unmerged": None}
    assert "| wanda | 70% | losa | 12.0 (10.0..14.0) | 2 |" in quality.table(runs)
