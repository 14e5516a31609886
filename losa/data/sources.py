"""Rows of text from local files, the Hugging Face hub, or the text that is part of Python."""

from __future__ import annotations

import json
import logging
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from losa.data import corpus
from losa.errors import DataError, shown
from losa.recipe.sections import DataSource

SUFFIXES = (".json", ".jsonl", ".parquet", ".raw", ".txt")
PLAIN_TEXT = (".raw", ".txt")
BUILTIN = "builtin:"
# Text that was cut within a character is written to JSON with half of a surrogate pair, as an escape.
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE = re.compile("[\ud800-\udfff]")

logger = logging.getLogger("losa")


class Row(NamedTuple):
    """``where``: names source and row in messages. ``plain``: the row is a whole text file."""

    where: str
    values: dict
    plain: bool = False


def read_rows(source: DataSource) -> list[dict]:
    """All rows of a source, at most ``source.limit``.

    A directory gives the rows of all its files of a known kind but hidden ones, in the order of their paths. A .txt or
    .raw file is one row, ``{text_field: its text}``. A hub data set with a limit is streamed, so that no more is
    downloaded than is used.

    Raises:
        DataError: missing, unreadable, malformed or empty; names file and row.
    """
    return [row.values for row in located_rows(source)]


def located_rows(source: DataSource) -> list[Row]:
    """The rows of ``read_rows`` with their places. Raises the same errors."""
    try:
        rows = list(islice(_rows(source), source.limit))
    except OSError as error:  # the file cannot be looked for: a name too long, a directory without permission
        raise DataError(f"data {shown(source.path)}: cannot be read ({error.strerror or error})") from error
    if not rows:
        raise DataError(f"data {source.path!r}: contains no rows")
    if source.limit is not None and len(rows) < source.limit and not any(row.plain for row in rows):
        logger.warning("data %r: limit is %d, but there are %d rows", source.path, source.limit, len(rows))
    return rows


def _rows(source: DataSource) -> Iterator[Row]:
    if not source.path.strip():
        raise DataError("data '': expected a file, a directory, a data set's name or builtin:pydoc/...")
    if source.path.startswith(BUILTIN):
        return _builtin_rows(source)
    try:
        os.fsencode(source.path)
        path = Path(source.path).expanduser()
    except (UnicodeEncodeError, RuntimeError) as error:  # RuntimeError: "~someone" is no user of this system
        raise DataError(f"data {shown(source.path)}: not a path ({error})") from error
    if path.is_dir():
        files = sorted(
            f
            for f in path.rglob("*")
            if f.suffix in SUFFIXES and f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)
        )
        if not files:
            raise DataError(f"data {source.path!r}: no {', '.join(SUFFIXES)} file in this directory")
        return (row for file in files for row in _file_rows(file, source))
    if path.is_file():
        return _file_rows(path, source)
    a_hub_name = path.suffix not in SUFFIXES and source.path.count("/") <= 1 and source.path[0] not in "./~"
    if not a_hub_name or "\0" in source.path:
        raise DataError(f"data {source.path!r}: no such file or directory")
    return _hub_rows(source)


def _builtin_rows(source: DataSource) -> Iterator[Row]:
    known = {f"{BUILTIN}pydoc/{part}": part for part in corpus.SHARES}
    if source.path not in known:
        raise DataError(f"data {source.path!r}: expected one of {', '.join(known)}")
    for number, text in enumerate(corpus.documents(known[source.path]), 1):
        yield Row(f"data {source.path!r}, row {number}", {source.text_field: text})


def _file_rows(path: Path, source: DataSource) -> Iterator[Row]:
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
        raise DataError(f"{where}: not a Parquet file ({_first_line(error)})") from error


def _arrow_rows(batch, where: str, before: int) -> list[dict]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, or a time that Python cannot represent
        for index in range(len(batch)):
            try:
                batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                raise DataError(f"{where}, row {before + index + 1}: cannot be read ({_first_line(error)})") from error
        raise


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _hub_rows(source: DataSource) -> Iterator[Row]:
    where = f"data {source.path!r}"
    name = {"path": source.path, "name": source.subset, "split": source.split}
    # The client of the hub raises errors of many kinds; the user needs one sentence.
    try:
        from datasets import load_dataset

        if source.limit is None:
            rows = load_dataset(**name)
        else:
            try:
                rows = load_dataset(**name, streaming=True)
            except Exception:
                # Without a network, a data set that was downloaded before can be loaded, but not streamed.
                rows = load_dataset(**name)
        for number, row in enumerate(rows, 1):
            yield Row(f"{where} (split {source.split!r}), row {number}", dict(row))
    except Exception as error:
        raise DataError(
            f"{where}: no such local file or directory, and cannot be loaded from the Hugging Face hub "
            f"({_first_line(error)}). "
            f"Check the name, the subset ({source.subset!r}), the split ({source.split!r}) and the network; or "
            "download the data elsewhere and give the local file"
        ) from error


def _after_space(text: str, at: int) -> int:
    """The first place from ``at`` on that is no space and no comma."""
    rest = re.compile(r"[^\s,]").search(text, at)
    return len(text) if rest is None else rest.start()
