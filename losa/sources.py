"""Rows of text from where they lie: local files, the Hugging Face hub, or the text that Python carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from losa import corpus
from losa.errors import DataError
from losa.recipe import DataSource

SUFFIXES = (".json", ".jsonl", ".parquet", ".raw", ".txt")
PLAIN_TEXT = (".raw", ".txt")
BUILTIN = "builtin:"


class Row(NamedTuple):
    """``where`` names source and row in messages; ``plain``: the row is a whole text file."""

    where: str
    values: dict
    plain: bool = False


def read_rows(source: DataSource) -> list[dict]:
    """All rows of a source, at most ``source.limit``.

    A directory gives the rows of all its files of a known kind (hidden ones left out), in the order of their paths. A
    .txt or .raw file is one row, ``{text_field: its text}``. A hub data set with a limit is streamed, so that only what
    is used is downloaded.

    Raises:
        DataError: missing, unreadable, malformed or empty; names file and row.
    """
    return [row.values for row in located_rows(source)]


def located_rows(source: DataSource) -> list[Row]:
    """``read_rows`` with the place that each row came from. Same errors."""
    rows = list(islice(_rows(source), source.limit))
    if not rows:
        raise DataError(f"data {source.path!r}: contains no rows")
    return rows


def _rows(source: DataSource) -> Iterator[Row]:
    if not source.path.strip():
        raise DataError("data '': expected a file, a directory, a data set's name or builtin:pydoc/...")
    if source.path.startswith(BUILTIN):
        return _builtin_rows(source)
    path = Path(source.path).expanduser()
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
    if not a_hub_name:
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
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}, line {number}: not JSON ({error.msg}, column {error.colno})") from error
            yield _checked(f"{where}, line {number}", row)


def _json_rows(path: Path, where: str) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # A second value after the first: one object a line, as many .json files on the hub are.
            yield from _json_lines(path, where)
            return
        raise DataError(f"{where}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _checked(f"{where}, row {number}", row)


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
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{where}, row {number}", row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: not a Parquet file ({str(error).splitlines()[0]})") from error


def _hub_rows(source: DataSource) -> Iterator[Row]:
    from datasets import load_dataset

    where = f"data {source.path!r}"
    name = {"path": source.path, "name": source.subset, "split": source.split}
    # The hub's client raises errors of many kinds; the user needs one sentence.
    try:
        if source.limit is None:
            rows = load_dataset(**name)
        else:
            try:
                rows = load_dataset(**name, streaming=True)
            except Exception:
                # Offline, a data set from an earlier download can be loaded, but not streamed.
                rows = load_dataset(**name)
        for number, row in enumerate(rows, 1):
            yield Row(f"{where} (split {source.split!r}), row {number}", dict(row))
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"{where}: no such local file or directory, and cannot be loaded from the Hugging Face hub ({reason}). "
            f"Check the name, the subset ({source.subset!r}), the split ({source.split!r}) and the network; or "
            "download the data elsewhere and give the local file"
        ) from error
