"""``python -m benchmarks compare``: rows are matched, ratios sorted, and files that are no results refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import compare

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OLD = {
    "benchmark": "toy",
    "machine": {"device": "A", "torch": "2.11.0", "losa_cpu": "avx2", "threads": 2},
    "origin": {"losa": "0.1.0", "commit": "0123456789", "date": "2026-01-01 00:00 UTC"},
    "rows": [
        {"op": "x", "shape": "8x8", "rank": 4, "implementation": "losa", "median_ms": 2.0, "min_ms": 1.0},
        {"op": "x", "shape": "8x8", "rank": 8, "implementation": "losa", "median_ms": 4.0, "min_ms": 4.0},
        {"op": "y", "implementation": "plain", "seconds": 1.0, "tokens_per_s": 7.0},
    ],
}  # fmt: skip


def write(folder: Path, name: str, document: object) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Writes OLD, and a NEW that measured the same rows in another order."""

    def written(change=lambda document: None) -> tuple[str, str]:
        new = copy.deepcopy(OLD)
        new["rows"][1]["median_ms"] = 6.0
        new["rows"][2]["seconds"] = 0.5
        new["rows"].reverse()
        change(new)
        return write(tmp_path, "old", OLD), write(tmp_path, "new", new)

    return written


def test_ratios_worst_first(files, capsys):
    assert compare.main([*files()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("old.json: A: instruction set avx2, torch 2.11.0, losa 0.1.0, commit 0123456789, measured "
                             "2026-01-01 00:00 UTC")  # fmt: skip
    table = [line.split() for line in lines if line.endswith(("_ms", "seconds"))]
    assert [row[0] for row in table] == ["1.500", "1.000", "1.000", "1.000", "0.500"]
    assert " ".join(table[0]) == "1.500 4 ms 6 ms toy: x, 8x8, rank 8, losa: median_ms"
    assert " ".join(table[-1]) == "0.500 1 s 0.5 s toy: y, plain: seconds"
    assert lines[-1] == "5 timings of 3 rows: median ratio 1.000, worst 1.500, best 0.500"
    assert not any("note" in line or "only in" in line for line in lines)


def test_limit_selection_and_failure(files, capsys):
    names = files()
    assert compare.main([*names, "--limit", "1", "--fail-above", "1.25"]) == 1
    out = capsys.readouterr().out
    assert out.count("toy:") == 1 and out.endswith("1 above 1.25, 0 newly failed\n") and "5 timings of 3" in out
    assert compare.main([*names, "--fail-above", "1.5"]) == 0
    assert compare.main([*names, "--only", "plain", "--fail-above", "1.25"]) == 0
    assert "1 timings of 1 rows" in capsys.readouterr().out


def test_limit_of_lists(files, capsys):
    """Of rows that one file lacks, the limit is printed, and how many more there are."""
    assert compare.main([*files(lambda new: new["rows"].pop(0) and new["rows"].pop(0)), "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "rows only in old: 2\n  toy: x, 8x8, rank 8, losa\n  and 1 more\n" in out


def test_a_selection_leaves_out_what_failed_elsewhere(files, capsys):
    def change(new):
        _, eight, four = new["rows"]
        del four["min_ms"], four["median_ms"]
        four["failed"] = "wrong by 2"
        eight["op"] = "z"

    names = files(change)
    assert compare.main([*names, "--only", "plain", "--fail-above", "9"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("0 above 9, 0 newly failed\n") and "wrong by 2" not in out and "only in" not in out
    for text in ("seconds", "s"):  # a field, and what every line has
        failed = compare.main([*names, "--only", text, "--fail-above", "9"])
        assert failed == (text == "s")


def test_zeros_and_what_is_not_finite_have_no_ratio(files, capsys):
    """A profiler without permission counts zero kernels; a perplexity can be infinite."""

    def change(new):
        new["rows"][0] |= {"kernels_ms": 0.0, "perplexity": 7.0}
        new["rows"][1]["min_ms"] = 0.0

    names = files(change)
    assert compare.main([*names, "--fail-above", "9"]) == 0
    out = capsys.readouterr().out
    assert "values that are no positive numbers in new: 2\n  toy: y, plain: kernels_ms: 0\n" in out
    assert "4 timings of 3 rows" in out and "timings only in old" not in out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_longer_finite_has_failed(files, capsys, value):
    assert compare.main([*files(lambda new: new["rows"][0].update(seconds=value)), "--fail-above", "9"]) == 1
    out = capsys.readouterr().out
    assert f"toy: y, plain: seconds: {value}" in out and out.endswith("0 above 9, 1 newly failed\n")


def test_what_a_file_does_not_state_is_noted(files, capsys):
    def change(new):
        del new["origin"]["date"], new["machine"]

    compare.main([*files(change)])
    assert "\nnote: new does not state its machine, its date\n" in capsys.readouterr().out
    for name, missing in (("cpu-cka", ["its commit", "its date"]), ("nvidia-h100-80gb-hbm3", ["its date"])):
        if RESULTS.exists():
            assert compare.unstated(json.loads((RESULTS / f"{name}.json").read_text())) == missing


def test_what_has_no_ratio_is_listed(files, capsys):
    def change(new):
        plain, eight, four = new["rows"]
        new["machine"] |= {"torch": "2.13.0", "losa_cpu": "avx512", "triton": "3.9"}
        del four["min_ms"], four["median_ms"]
        four["failed"] = "wrong by 2"
        eight["host_ms"] = 1.0
        plain["op"] = "z"

    assert compare.main([*files(change), "--fail-above", "9"]) == 1
    out = capsys.readouterr().out
    assert "note: the files differ in torch 2.11.0 / 2.13.0, losa_cpu avx2 / avx512 (old / new)" in out
    assert "rows only in old: 1\n  toy: y, plain\n" in out and "rows only in new: 1\n  toy: z, plain\n" in out
    assert "timings only in new: host_ms of 1 rows" in out and "timings only in old" not in out
    assert "rows that failed in new: 1\n  toy: x, 8x8, rank 4, losa: wrong by 2" in out
    assert out.endswith("0 above 9, 1 newly failed\n")


def test_a_row_that_was_measured_twice_is_matched_in_order(files, capsys):
    def change(new):
        new["rows"] += [{**new["rows"][0], "seconds": 8.0}]

    compare.main([*files(change)])
    assert "rows only in new: 1\n  toy: y, plain, no. 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ([1], "expected a JSON object, got list"),
        ({"recipe": {}, "results": []}, "not a result of a benchmark: .* got 'recipe', 'results'"),
        ({**OLD, "rows": [1]}, "not a result of a benchmark: "),
        ({**OLD, "rows": [{"op": "x", "median_ms": "2"}]}, "toy: x: median_ms: expected a number, got '2'"),
        ({**OLD, "rows": []}, "have no timing in common"),
    ],
)
def test_other_files_are_refused(tmp_path, document, reason):
    with pytest.raises(SystemExit, match=reason):
        compare.main([write(tmp_path, "old", OLD), write(tmp_path, "new", document)])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.json").write_text("no JSON")
    for name, reason in (("missing", "No such file"), ("text", "expected JSON")):
        with pytest.raises(SystemExit, match=rf"compare: .*{name}.json: {reason}"):
            compare.main([write(tmp_path, "old", OLD), str(tmp_path / f"{name}.json")])


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--fail-above", "no"], ["--fail-above", "-1"]])
def test_bad_options(files, flags, capsys):
    with pytest.raises(SystemExit):
        compare.main([*files(), *flags])
    assert f"got '{flags[1]}'" in capsys.readouterr().err


@pytest.mark.skipif(not RESULTS.exists(), reason="an installed package has no results")
@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_files(path):
    """Every row of every file says what it measured: rows that only their results tell apart would be counted twice."""
    if path.stem.startswith(("demo", "interrupted")):
        with pytest.raises(SystemExit, match="not a result of a benchmark"):
            compare.read(path)
        return
    results = compare.read(path)
    found = compare.ratios(results, results)
    assert found and {ratio for ratio, *_ in found} == {1.0}
    twice = {compare.label(row) for row in results.timings if row[-1].startswith("no. ")}
    assert not twice or path.stem == "nvidia-h100-80gb-hbm3"
