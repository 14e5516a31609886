"""The user's text for a whole run, in three parts: as they are named, or split from anything else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from losa import __version__
from losa.data.corpus import SHARES
from losa.data.row_files import PLAIN_TEXT, Row
from losa.data.sources import located_rows
from losa.errors import DataError, OutputError, reason
from losa.recipe.sources import DataSource
from losa.storage.files import MARKER, write_json, write_text

PARTS = tuple(SHARES)


def named_parts(data: Path) -> dict[str, Path]:
    """The files or directories of ``data`` named calibration, train and heldout (with any suffix), by name; {} for a
    file.

    Raises:
        DataError: no such file or directory, or two of one name.
    """
    try:
        if not data.exists():
            raise DataError(f"--data {data}: no such file or directory")
        inside = sorted(data.iterdir()) if data.is_dir() else []
    except OSError as error:  # a name too long, or a directory without permission
        raise DataError(f"--data {data}: cannot be read ({reason(error)})") from error
    found: dict[str, Path] = {}
    for path in inside:
        if path.stem in PARTS and path.stem in found:
            raise DataError(f"--data {data}: {found[path.stem].name} and {path.name} are both named {path.stem}")
        if path.stem in PARTS:
            found[path.stem] = path
    return found


def split(data: Path, directory: Path) -> tuple[dict[str, Path], str]:
    """Split the text of ``data`` and write it to ``directory``: 15 % calibration, 60 % train, 25 % heldout.

    The content of a row decides its part, not its place or chance, and equal rows go to the same part. A single text
    file is cut at line ends instead, in the order above.

    Returns:
        the files, by part, and a sentence that describes them.

    Raises:
        DataError: ``data`` cannot be read, or is too little for three parts.
        OutputError: ``directory`` cannot be written, or has files of these names that losa did not write.
    """
    rows = located_rows(DataSource(path=str(data)))
    if len(rows) == 1 and rows[0].plain:
        suffix, unit = PLAIN_TEXT[-1], "characters"
        texts = _cut(rows[0].values["text"])
        sizes = [len(text) for text in texts]
    else:
        suffix, unit = ".jsonl", "rows"
        dealt = _deal([_as_line(row) for row in rows])
        texts = ["".join(line + "\n" for line in lines) for lines in dealt]
        sizes = [len(lines) for lines in dealt]
    if not all(text.strip() for text in texts):
        raise DataError(f"--data {data}: {sum(sizes)} {unit} are too few for calibration, train and heldout text")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {directory}: {reason(error)}") from error
    files = {part: directory / f"{part}{suffix}" for part in PARTS}
    marker = directory / MARKER
    if not marker.is_file() and (there := [path for path in files.values() if path.exists()]):
        raise OutputError(
            f"--data {data}: its parts would replace {there[0]}, which losa did not write; move that away"
        )
    write_json(marker, {"losa_version": __version__, "data": str(data)})
    for path, text in zip(files.values(), texts, strict=True):
        write_text(path, text)
    counts = ", ".join(f"{size:,} {part}" for part, size in zip(PARTS, sizes, strict=True))
    return files, f"{data} was split by {unit} ({counts}); the parts are in {directory}"


def _as_line(row: Row) -> str:
    try:
        return json.dumps(row.values, ensure_ascii=False, sort_keys=True, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{row.where}: cannot be written as a line of JSON ({error})") from error


def _deal(lines: list[str]) -> list[list[str]]:
    keys = [hashlib.sha256(line.encode()).digest() for line in lines]
    order = sorted(set(keys))
    first = max(1, round(SHARES["calibration"] * len(order)))
    last = len(order) - max(1, round(SHARES["heldout"] * len(order)))
    part = {key: 0 if place < first else 1 if place < last else 2 for place, key in enumerate(order)}
    return [[line for line, key in zip(lines, keys, strict=True) if part[key] == index] for index in range(len(PARTS))]


def _cut(text: str) -> list[str]:
    shares = (SHARES["calibration"], SHARES["calibration"] + SHARES["train"])
    ends = [text.find("\n", int(share * len(text))) + 1 or len(text) for share in shares]
    return [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]]
