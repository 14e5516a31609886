"""Figures and the numbers beside them."""

from __future__ import annotations

import csv

import pytest
from PIL import Image

from losa.errors import OutputError
from losa.output.figures import write_figures
from losa.record import MethodResult, RoundRecord
from tests.helpers.records import BLOCKS, make_record


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
