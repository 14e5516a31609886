"""Two result files side by side: the ratio NEW / OLD of each timing, worst first.

A file is one that --json of any benchmark, --out of gpu or quality, or tools/gpu.sh wrote. Rows are matched by the
fields that say what was measured (op, shape, dtype, implementation, ...). A ratio above 1 is slower; of quality, a
perplexity above 1 is worse. What has no ratio follows: rows and timings that only one file has, values that are no
positive numbers.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks._machine import describe, differences
from benchmarks._results import plain_parser, read_document

# What a row measured. All other fields of a row are results.
IDENTITY = (
    "op", "model", "run", "name", "shape", "batch", "tokens", "T", "rank", "r", "dropout_p", "sparsity", "pattern",
    "layers", "samples", "features", "dtype", "allocator", "tile", "implementation", "stage",
)  # fmt: skip
UNITS = {"us": "us", "seconds": "s", "perplexity": "", "perplexity_unmerged": ""}  # by field, see ``unit``
Row = tuple[str, ...]  # the benchmark's name, and what the row measured in words


@dataclass
class Results:
    """One file. ``failed`` has the reason of each row that failed. ``odd`` has the values that no ratio can be made of:
    zeros (kernels that a profiler did not see), NaN and infinity (a perplexity)."""

    document: dict
    timings: dict[Row, dict[str, float]]
    failed: dict[Row, str]
    odd: dict[tuple[Row, str], float]


def main(argv: list[str]) -> int:
    parser = plain_parser("compare", __doc__)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--only", metavar="TEXT", help="only what has TEXT in its line, such as losa")
    parser.add_argument("--limit", type=_at_least_one, metavar="N", help="only the N worst ratios, N rows of each list")
    parser.add_argument(
        "--fail-above", type=_ratio, metavar="RATIO",
        help="exit with 1 if a ratio is larger, or if a row or value of OLD failed or is not finite in NEW",
    )  # fmt: skip
    args = parser.parse_args(argv)
    old, new = selected(args.only or "", read(args.old), read(args.new))
    for name, path, results in (("old", args.old, old), ("new", args.new, new)):
        print(f"{name}: {path}: {describe(results.document)}")
    for name, results in (("old", old), ("new", new)):
        if missing := unstated(results.document):
            print(f"note: {name} does not state {', '.join(missing)}")
    if different := differences(old.document.get("machine", {}), new.document.get("machine", {})):
        print(f"note: the files differ in {', '.join(different)} (old / new)")

    found = ratios(old, new)
    if not found:
        raise SystemExit(f"compare: {args.old} and {args.new} have no timing in common")
    print(f"\n{'new/old':>8} {'old':>12} {'new':>12}")
    for ratio, before, after, row, field in found[: args.limit]:
        print(f"{ratio:>8.3f} {before:>9.4g} {unit(field):<2} {after:>9.4g} {unit(field):<2}  {line(row, field)}")
    for text in unmatched(old, new, args.limit):
        print(text)
    values = [ratio for ratio, *_ in found]
    print(
        f"\n{len(values)} timings of {len({row for *_, row, _ in found})} rows: median ratio "
        f"{statistics.median(values):.3f}, worst {values[0]:.3f}, best {values[-1]:.3f}"
    )
    if args.fail_above is None:
        return 0
    above, failed = sum(ratio > args.fail_above for ratio in values), newly_failed(old, new)
    print(f"{above} above {args.fail_above:g}, {failed} newly failed")
    return int(above > 0 or failed > 0)


def selected(text: str, old: Results, new: Results) -> list[Results]:
    """Of both files what has ``text`` in its line; a row that failed belongs to its timings in the other file."""
    rows = set()
    for file in (old, new):
        rows |= {row for row in file.timings if text in label(row)}
        fields = [*file.odd, *((row, field) for row, timings in file.timings.items() for field in timings)]
        rows |= {row for row, field in fields if text in line(row, field)}
    return [
        Results(
            file.document,
            {
                row: {field: value for field, value in timings.items() if text in line(row, field)}
                for row, timings in file.timings.items()
                if row in rows
            },
            {row: reason for row, reason in file.failed.items() if row in rows},
            {key: value for key, value in file.odd.items() if text in line(*key)},
        )
        for file in (old, new)
    ]


def unstated(document: dict) -> list[str]:
    """What a file does not say of its measurement; the oldest files say neither the commit nor the date."""
    origin = document.get("origin", {})
    commit = origin.get("commit") or document.get("kernels_of")
    stated = {"its machine": document.get("machine"), "its commit": commit, "its date": origin.get("date")}
    return [name for name, value in stated.items() if not value]


def newly_failed(old: Results, new: Results) -> int:
    """How many rows of OLD failed in NEW, and how many of its values are NaN or infinite there."""
    rows = [row for row in new.failed if row in old.timings and row not in old.failed]
    values = [value for (row, field), value in new.odd.items() if field in old.timings.get(row, ())]
    return len(rows) + sum(not math.isfinite(value) for value in values)


def ratios(old: Results, new: Results) -> list[tuple[float, float, float, Row, str]]:
    """(NEW / OLD, old value, new value, row, field) of all timings that both files have, worst first."""
    found = [
        (after / before, before, after, row, field)
        for row, timings in old.timings.items()
        for field, before in timings.items()
        if (after := new.timings.get(row, {}).get(field)) is not None
    ]
    return sorted(found, key=lambda entry: -entry[0])


def unmatched(old: Results, new: Results, limit: int | None = None) -> Iterable[str]:
    """Lines about everything that has no ratio; of each list the first ``limit``."""

    def listed(title: str, lines: list[str]) -> Iterable[str]:
        if lines:
            yield f"\n{title}: {len(lines)}"
            yield from (f"  {text}" for text in lines[:limit])
            if limit is not None and len(lines) > limit:
                yield f"  and {len(lines) - limit} more"

    for name, one, other in (("old", old, new), ("new", new, old)):
        yield from listed(f"rows only in {name}", [label(row) for row in one.timings if row not in other.timings])
        both = [row for row in one.timings if row in other.timings and row not in other.failed]
        fields = Counter(
            field
            for row in both
            for field in one.timings[row]
            if field not in other.timings[row] and (row, field) not in other.odd
        )
        if fields:
            counted = ", ".join(f"{field} of {count} rows" for field, count in fields.items())
            yield f"\ntimings only in {name}: {counted}"
    for name, results in (("old", old), ("new", new)):
        failed = [f"{label(row)}: {reason}" for row, reason in results.failed.items()]
        yield from listed(f"rows that failed in {name}", failed)
        odd = [f"{line(*key)}: {value:g}" for key, value in results.odd.items()]
        yield from listed(f"values that are no positive numbers in {name}", odd)


def read(path: Path) -> Results:
    """Raises SystemExit: the file is no result of a benchmark."""
    document = read_document("compare", path)
    try:
        results, seen = Results(document, {}, {}, {}), Counter()
        for benchmark, rows in tables(document).items():
            for fields in rows:
                row = identity(benchmark, fields)
                seen[row] += 1
                if seen[row] > 1:  # measured twice; both files have such rows in the same order
                    row = (*row, f"no. {seen[row]}")
                found = numbers(row, fields)
                results.timings[row] = {field: value for field, value in found.items() if 0 < value < math.inf}
                results.odd |= {(row, f): value for f, value in found.items() if f not in results.timings[row]}
                if fields.get("failed"):
                    results.failed[row] = fields["failed"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise SystemExit(f"compare: {path}: not a result of a benchmark: {error}") from error
    return results


def tables(document: dict) -> dict[str, list[dict]]:
    """Rows by benchmark. ValueError: the document is of no known kind."""
    if isinstance(document.get("benchmarks"), dict):
        return document["benchmarks"]
    if "benchmark" in document and isinstance(document.get("rows"), list):
        return {document["benchmark"]: document["rows"]}
    if document.get("benchmark") == "decode":
        # The file of a checkpoint tells tokens a second, and only its part "speed" has timings.
        rows = document.get("speed", {}).get("rows", [])
        return {"decode": [{"name": row["name"], "token_ms": 1e3 / row["tokens_per_second"]} for row in rows]}
    if isinstance(document.get("runs"), dict):
        return {"quality": [quality_row(key, run) for key, run in document["runs"].items()]}
    raise ValueError(f'expected the key "rows", "benchmarks" or "runs", got {", ".join(map(repr, document)) or "none"}')


def quality_row(key: str, run: dict) -> dict:
    """Method, pruner, sparsity and seed are in the key; the sparsity in the run is a result."""
    return {"run": key, **{field: run.get(field) for field in ("perplexity", "perplexity_unmerged", "seconds")}}


def identity(benchmark: str, fields: dict) -> Row:
    """What a row measured, in words. Only numbers need the name of their field."""
    known = {field: fields[field] for field in IDENTITY if fields.get(field) is not None}
    words = (value if isinstance(value, str) else f"{field} {value}" for field, value in known.items())
    return benchmark, *(word for word in words if word != benchmark)


def label(row: Row) -> str:
    return f"{row[0]}: {', '.join(row[1:])}" if row[1:] else row[0]


def line(row: Row, field: str) -> str:
    return f"{label(row)}: {field}"


def numbers(row: Row, fields: dict) -> dict[str, float]:
    """The timings of a row. ValueError: one is no number."""
    found = {field: value for field, value in fields.items() if unit(field) is not None and value is not None}
    for field, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{line(row, field)}: expected a number, got {value!r}")
    return found


def unit(field: str) -> str | None:
    """The unit of a timing; None for all other fields."""
    if field in UNITS:
        return UNITS[field]
    stem, _, last = field.rpartition("_")
    return last if last in ("ms", "s") and not stem.endswith("_per") else None


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
