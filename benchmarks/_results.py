"""Result files: the options that choose what is measured, rows, the table on the screen and the JSON file."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._machine import machine, origin
from benchmarks._timing import medians

WIDEST = 120  # columns of a help text


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``doc`` is its module's docstring."""
    parser = plain_parser(name, doc)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows, the machine, the commit and date"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="runs of each candidate, instead of a number by size"
    )
    return parser


def plain_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose help shows the paragraphs of a docstring as they are."""
    width = min(shutil.get_terminal_size().columns - 2, WIDEST)
    paragraphs = [textwrap.fill(" ".join(part.split()), width) for part in doc.replace("``", "").split("\n\n")]
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description="\n\n".join(paragraphs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def rows(times: dict[str, list[float]], baseline: str, **fields) -> list[dict]:
    """A row for each implementation; ``times`` has the seconds of its runs."""
    median = medians(times)
    return [
        {
            **fields,
            "implementation": name,
            "median_ms": 1e3 * median[name],
            "min_ms": 1e3 * min(values),
            f"speedup_over_{baseline}": median[baseline] / median[name],
        }
        for name, values in times.items()
    ]


def report(name: str, results: Iterable[dict], path: Path | None, device: str) -> None:
    """Print the rows as a table and write them as JSON. The file is written again after each row, so that a benchmark
    that is ended leaves what it has measured."""
    document = {"benchmark": name, "machine": machine(device), "origin": origin(), "rows": []}
    found = document["rows"]
    for row in results:
        found.append(row)
        if path is not None:
            write_document(path, document)
    columns = list(dict.fromkeys(key for row in found for key in row))
    table = Table(*columns, title=name)
    for row in found:
        cells = (row.get(c, "") for c in columns)
        table.add_row(*(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=200).print(table)


def write_document(path: Path, document: dict) -> None:
    """Write JSON, the whole file or nothing, with a line for each of the document's "rows"."""
    text = json.dumps(document | ({"rows": []} if "rows" in document else {}), indent=1)
    if document.get("rows"):
        lines = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
        text = text.replace('"rows": []', f'"rows": [\n{lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def read_document(command: str, path: Path) -> dict:
    """A JSON object. Raises SystemExit: the file cannot be read or is something else."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"{command}: {path}: {error.strerror}") from error
    except ValueError as error:
        raise SystemExit(f"{command}: {path}: expected JSON: {error}") from error
    if not isinstance(document, dict):
        raise SystemExit(f"{command}: {path}: expected a JSON object, got {type(document).__name__}")
    return document
