"""Rows from files, directories and the hub; bad ones are named."""

from __future__ import annotations

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from losa.data.sources import read_rows
from losa.errors import DataError
from losa.recipe.sources import DataSource
from tests.helpers.rows import write


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"text": "one"}, {"text": "two\nlines"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert read_rows(DataSource(path=str(tmp_path / name))) == rows, name
    (tmp_path / "e.txt").write_text("plain\n\ntext")
    (tmp_path / "readme.md").write_text("no data")
    (tmp_path / ".hidden.txt").write_text("no data")
    everything = read_rows(DataSource(path=str(tmp_path)))
    assert everything == rows * 4 + [{"text": "plain\n\ntext"}]
    assert read_rows(DataSource(path=str(tmp_path), limit=3)) == everything[:3]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl', line 2: not JSON"),
        ("a.jsonl", "\n[1]\n", "a.jsonl', line 2: expected an object"),
        ("a.jsonl", "", "no rows"),
        ("a.json", "[1, 2]", "row 1: expected an object"),
        ("a.json", '{"text": ', "a.json', line 1: not JSON"),
        ("a.txt", " \n\n", "no rows"),
        ("a.parquet", "not parquet", "a.parquet': not a Parquet file"),
        ("a.csv", "x,y", "expected a file ending in"),
        ("a.txt", b"\xff\xfe\x00", "a.txt': not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', "a.jsonl', line 2: not UTF-8 text"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "y", "z": ' + "[" * 200_000 + "]" * 200_000 + "}",
            "line 2: JSON that is nested too",
        ),
        (
            "a.json",
            '[{"text": "x"}, {"z": ' + "[" * 200_000 + "]" * 200_000 + "}]",
            "a.json', row 2: JSON that is nested too",
        ),
        ("a.jsonl", '{"text": "x", "unread": ' + "7" * 5000 + "}", "a.jsonl', line 1: an integer of too many digits"),
        ("a.json", '[{"text": "x"},\n{"n": -' + "7" * 5000 + "}]", "a.json', row 2: an integer of too many digits"),
        ("a.json", '{"text": "x"}\n{"n": ' + "7" * 5000 + "}", "a.json', line 2: an integer of too many digits"),
        ("a.json", "[]", "no rows"),
        ("a.parquet", b"PAR1" + bytes(64) + b"PAR1", "a.parquet': "),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_rows(DataSource(path=str(path)))
    assert message in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json"])
def test_unusual_json_is_read(tmp_path, name):
    lines = [
        '{"text": "nul \\u0000 and \\ud83d\\ude00", "x": NaN, "y": -Infinity}',
        '{"te\\ud83dxt": [{"a": "\\udc00b"}], "text": "cut \\uD83D", "path": "C:\\\\ud800"}',
    ]
    text = "[" + ",\n".join(lines) + "]" if name == "a.json" else "\r\n".join(lines)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read_rows(DataSource(path=str(tmp_path / name)))
    assert first["text"] == "nul \0 and \U0001f600"
    assert second == {"te\ufffdxt": [{"a": "\ufffdb"}], "text": "cut \ufffd", "path": "C:\\ud800"}


def test_half_of_a_pair_is_pointed_out_once(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + '{"text": "\\udfff"}\n' * 3)
    with caplog.at_level(logging.WARNING, "losa"):
        rows = read_rows(DataSource(path=str(tmp_path / "a.jsonl")))
    assert [row["text"] for row in rows] == ["x"] + ["\ufffd"] * 3
    assert len(caplog.records) == 1 and "a.jsonl', line 2: half of a surrogate pair" in caplog.text


def test_parquet_values_that_python_has_no_object_for(tmp_path):
    times = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "when": times}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet', row 2: cannot be read"):
        read_rows(DataSource(path=str(tmp_path / "a.parquet")))
    texts = pyarrow.array([b"fine", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet', row 2: cannot be read .*utf-8"):
        read_rows(DataSource(path=str(tmp_path / "b.parquet")))


@pytest.mark.parametrize(
    "path",
    ["x" * 300 + ".txt", "/" + "x" * 300, "a\0b.jsonl", "/a\0b", "~no_such_user/x.txt", "\ud83d.txt", "/dev/null"],
)
def test_names_that_no_file_has(path):
    with pytest.raises(DataError, match="data '"):
        read_rows(DataSource(path=path))


def test_a_limit_beyond_the_rows_is_pointed_out(tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with caplog.at_level(logging.WARNING, "losa"):
        assert len(read_rows(source.model_copy(update={"limit": 3}))) == 3
        assert not caplog.records
        assert len(read_rows(source.model_copy(update={"limit": 5}))) == 3
    assert "limit is 5, but there are 3 rows" in caplog.text


@pytest.mark.parametrize("path", ["missing.jsonl", "/no/where", "./no/where", "a/b/c", "builtin:pydoc/all", " "])
def test_missing_sources_are_named(path):
    with pytest.raises(DataError, match="data '"):
        read_rows(DataSource(path=path))


def test_directory_without_data(tmp_path):
    with pytest.raises(DataError, match=r"no \.json"):
        read_rows(DataSource(path=str(tmp_path)))


def test_hub_data_set(monkeypatch):
    calls = []

    def load_dataset(path, name, split, streaming=False):
        calls.append((path, name, split, streaming))
        if streaming and path == "cached/only":
            raise ConnectionError("offline")
        if path == "not/there":
            raise ConnectionError("offline\ndetails")
        return iter([{"text": str(i)} for i in range(4)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(read_rows(DataSource(path="some/data", subset="en", split="test"))) == 4
    assert len(read_rows(DataSource(path="some/data", limit=2))) == 2
    assert len(read_rows(DataSource(path="cached/only", limit=2))) == 2
    assert calls == [
        ("some/data", "en", "test", False),
        ("some/data", None, "train", True),
        ("cached/only", None, "train", True),
        ("cached/only", None, "train", False),
    ]
    with pytest.raises(DataError, match=r"'not/there'.*hub \(offline\).*subset.*give the local file"):
        read_rows(DataSource(path="not/there"))
