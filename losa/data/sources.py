"""Rows of text from local files, the Hugging Face hub, or the text that is part of Python."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from losa.data import corpus
from losa.data.row_files import SUFFIXES, Row, file_rows, first_line
from losa.distributed.watch import progress
from losa.errors import DataError, shown
from losa.recipe.sources import DataSource

BUILTIN = "builtin:"

logger = logging.getLogger("losa")


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
    where = f"reading {source.path}"
    try:
        rows = []
        for row in islice(_rows(source), source.limit):
            progress(where)
            rows.append(row)
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
        return (row for file in files for row in file_rows(file, source))
    if path.is_file():
        return file_rows(path, source)
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
            f"({first_line(error)}). "
            f"Check the name, the subset ({source.subset!r}), the split ({source.split!r}) and the network; or "
            "download the data elsewhere and give the local file"
        ) from error
