"""Text of one's own, in named parts or dealt out."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from losa.data.sources import read_rows
from losa.data.splitting import named_parts, split
from losa.errors import DataError
from losa.recipe.sources import DataSource


@pytest.mark.parametrize("name", ["x" * 300, "/" + "y" * 300 + "/z", "a\0b"])
def test_parts_of_names_that_no_file_has(name):
    with pytest.raises(DataError, match="--data "):
        named_parts(Path(name))


def test_rows_of_all_kinds_can_be_dealt_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {i} \\ud83d", "x": NaN}}\n' for i in range(20)))
    parts, _ = split(tmp_path / "a.jsonl", tmp_path / "parts")
    assert sum(len(read_rows(DataSource(path=str(path)))) for path in parts.values()) == 20
    deep = '{"text": "x", "deep": ' + "[" * 950 + "]" * 950 + "}\n"
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n' + deep * 3)

    def at_depth(n):
        """Writing JSON needs more of Python's stack than reading it: somewhere the row is read and not written."""
        return at_depth(n - 1) if n else split(tmp_path / "b.jsonl", tmp_path / "parts")

    for depth in range(0, 60, 4):
        with suppress(DataError):
            at_depth(depth)
