"""Rows of one file: plain text, JSON, lines of JSON or Parquet."""

from __future__ import annotations

import json
import logging
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from losa.errors import DataError
from losa.recipe.sources import DataSource

logger = logging.getLogger("losa")

SUFFIXES = (".json", ".jsonl", ".parquet", ".raw", ".txt")
PLAIN_TEXT = (".raw", ".txt")
# Text that was cut within a character is written to JSON with half of a surrogate pair, as an escape.
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """``where``: names source and row in messages. ``plain``: the row is a whole text file."""

    where: str
    values: dict
    plain: bool = False


def file_rows(path: Path, source: DataSource) -> Iterator[Row]:
    """The rows of a file, by its suffix.

    Raises:
        DataError: unreadable or malformed; names file and row.
    """
    where = f"data {str(path)!r}"
    try:
        if path.suffix in PLAIN_TEXT:
            text = path.read_text(encoding="utf-8-sig")
            if text.strip():
                yield Row(where, {source.text_field: text}, plain=True)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path, where)
        elif path.suffix == ".json":
            yield from _json_rows(path, where)
        elif path.suffix == ".parquet":
            yield from _parquet_rows(path, where)
        else:
            raise DataError(f"{where}: expected a file ending in {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error


def _json_lines(path: Path, where: str) -> Iterator[Row]:
    with path.open("rb") as file:
        # Lines are decoded one by one, so that messages can name the line. A lone carriage return ends a line too.
        lines = (line for chunk in file for line in chunk.splitlines())
        mend = _Mender()
        for number, line in enumerate(lines, 1):
            place = f"{where}, line {number}"
            text = _decoded(line.removeprefix(BOM_UTF8) if number == 1 else line, place)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
                yield _checked(place, mend(row, place) if HALF_PAIR.search(text) else row)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: {_json_fault(error)}") from error


def _json_rows(path: Path, where: str) -> Iterator[Row]:
    text = _decoded(path.read_bytes().removeprefix(BOM_UTF8), where)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # A second value follows the first: many .json files on the hub hold one object a line.
            yield from _json_lines(path, where)
            return
        raise DataError(f"{where}, line {error.lineno}: {_json_fault(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}, row {_row_at_fault(text)}: {_json_fault(error)}") from error
    mend = _Mender() if HALF_PAIR.search(text) else None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        place = f"{where}, row {number}"
        try:
            yield _checked(place, row if mend is None else mend(row, place))
        except RecursionError as error:
            raise DataError(f"{place}: {_json_fault(error)}") from error


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep"
    return "an integer of too many digits"


def _row_at_fault(text: str) -> int:
    """The number, from 1, of the row of a JSON list that Python's parser cannot read."""
    decoder = json.JSONDecoder()
    number, at = 1, len(text) - len(text.lstrip()) + 1
    try:
        while text.lstrip().startswith("["):
            at = decoder.raw_decode(text, _after_space(text, at))[1]
            number += 1
    except (ValueError, RecursionError):
        pass
    return number


def _after_space(text: str, at: int) -> int:
    """The first place from ``at`` on that is no space and no comma."""
    rest = re.compile(r"[^\s,]").search(text, at)
    return len(text) if rest is None else rest.start()


class _Mender:
    """Replaces halves of surrogate pairs, which are no text, by U+FFFD, and warns once."""

    def __init__(self):
        self.said = False

    def __call__(self, row, where: str):
        mended = self._mend(row)
        if mended != row and not self.said:
            self.said = True
            logger.warning("%s: half of a surrogate pair is read as U+FFFD; so it is in later rows", where)
        return mended

    def _mend(self, value):
        if isinstance(value, str):
            return SURROGATE.sub("\ufffd", value)
        if isinstance(value, list):
            return [self._mend(v) for v in value]
        return {self._mend(k): self._mend(v) for k, v in value.items()} if isinstance(value, dict) else value


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _checked(where: str, row) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with named fields, got {type(row).__name__}")
    return Row(where, row)


def _parquet_rows(path: Path, where: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in _arrow_rows(batch, where, number):
                    number += 1
                    yield Row(f"{where}, row {number}", row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: not a Parquet file ({first_line(error)})") from error


def _arrow_rows(batch, where: str, before: int) -> list[dict]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, or a time that Python cannot represent
        for index in range(len(batch)):
            try:
                batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                raise DataError(f"{where}, row {before + index + 1}: cannot be read ({first_line(error)})") from error
        raise


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
