"""A result file of a GPU as markdown, with the predictions beside the measured values, and the answers to the questions
that were asked before the run.

FILE is a file that tools/gpu.sh or python -m benchmarks gpu wrote; a second file may hold the rows of
tools/gpu.sh again. Predictions and questions are in predictions.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks._machine import describe
from benchmarks._results import plain_parser, read_document

PREDICTIONS = Path(__file__).with_name("predictions.json")
WAYS = ("window", "tiles", "unpack")
Rows = Sequence[dict]


def main(argv: list[str]) -> int:
    parser = plain_parser("report", __doc__)
    parser.add_argument("file", type=Path, nargs="+")
    args = parser.parse_args(argv)
    documents = [read_document("report", file) for file in args.file]
    for file, document in zip(args.file, documents, strict=True):
        if "benchmarks" not in document:
            raise SystemExit(f"report: {file} is no result of tools/gpu.sh or of benchmarks gpu")
    print(report(documents, json.loads(PREDICTIONS.read_text())))
    return 0


def report(documents: Sequence[dict], predictions: dict) -> str:
    first = documents[0]
    benchmarks = {name: rows for document in documents for name, rows in document["benchmarks"].items()}
    parts = [describe(first)]
    for title, name, table in TABLES:
        if rows := benchmarks.get(name):
            parts += [f"### {title}", table(rows)]
    for name, rows in benchmarks.items():
        if "=" in name:
            parts += [f"### {name}", plain(rows)]
    parts += ["### Predictions and goals", compared(predictions, benchmarks, first)]
    parts += ["### Questions", answers(predictions["questions"], benchmarks, first.get("smoke", []))]
    if failures := [failure for document in documents for failure in failed(document)]:
        parts += ["### Failed", "\n".join(f"- {failure}" for failure in failures)]
    return "\n\n".join(parts)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown; the first column is text."""
    header = list(header)
    lines = [header, ["---", *(["---:"] * (len(header) - 1))], *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plain(rows: Rows) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return table(columns, ([row.get(column) for column in columns] for row in rows))


def grouped(rows: Rows, *fields: str) -> dict[tuple, dict[str, dict]]:
    """The rows by the fields' values, then by implementation."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(field) for field in fields), {})[row.get("implementation", "")] = row
    return found


def decode_table(rows: Rows) -> str:
    """Microseconds."""

    def microseconds(row: dict | None) -> float | str | None:
        return None if row is None else row.get("failed") or 1e3 * row["median_ms"]

    lines = []
    for (shape, pattern, batch), ways in grouped(rows, "shape", "pattern", "batch").items():
        dense, ours = ways.get("dense bf16"), ways.get("losa bf16")
        times = [microseconds(ways.get(f"losa bf16, {way}")) for way in WAYS]
        ratio = dense["median_ms"] / ours["median_ms"] if dense and ours else None
        lines.append([f"{shape}, {pattern}, batch {batch}", microseconds(dense), *times, microseconds(ours), ratio])
    return table(["us", "dense bf16", *WAYS, "chosen", "dense / chosen"], lines)


def lora_table(rows: Rows) -> str:
    """Milliseconds."""
    names, lines = ("losa", "losa, fused", "losa, compose", "plain", "three_products", "eager_losa"), []
    for key, ways in grouped(rows, "op", "shape", "tokens", "rank", "dropout_p").items():
        op, shape, tokens, rank, dropout = key
        if "losa" in ways:
            times = [ways[name]["median_ms"] if name in ways else None for name in names]
            label = f"{op}, {shape}, T {tokens}, r {rank}" + (f", dropout {dropout}" if dropout else "")
            lines.append([label, *times, ways["losa"].get("host_ms"), ways["losa"].get("times_floor")])
    return table(["ms", "chosen", "fused", "compose", *names[3:], "host", "chosen / floor"], lines)


def experts_table(rows: Rows) -> str:
    """Milliseconds."""
    names, lines = ("losa", "losa, one by one", "transformers", "transformers, frozen"), []
    for (shape, tokens, sparsity), ways in grouped(rows, "shape", "tokens", "sparsity").items():
        times = [ways[name]["median_ms"] if name in ways else None for name in names]
        ours = ways.get("losa", {})
        label = f"{shape}, T {tokens}, {100 * sparsity:g}% zeros"
        lines.append([label, *times, ours.get("times_trained"), ours.get("times_frozen")])
    return table(["ms", *names, "losa / transformers", "losa / frozen"], lines)


def stage_table(rows: Rows) -> str:
    """Milliseconds of ours and of the official manner."""
    lines = [
        [
            ", ".join(str(row[field]) for field in ("op", "shape", "pattern", "dtype") if row.get(field)),
            *(row.get(field) for field in ("losa_ms", "host_ms", "official_ms", "torch_ms", "speedup")),
            row.get("fraction_of_copy_bandwidth", row.get("fraction_of_limit")),
        ]
        for row in rows
    ]
    return table(["ms", "losa", "host", "official", "torch", "official / losa", "of the limit"], lines)


def way_table(rows: Rows) -> str:
    fields = ("op", "shape", "pattern", "dtype", "samples", "implementation")
    lines = [
        [
            ", ".join(str(row[field]) for field in fields if row.get(field)),
            row.get("median_ms"),
            row.get("kernels_ms"),
            row.get("fraction_of_copy_bandwidth", row.get("fraction_of_limit")),
        ]
        for row in rows
    ]
    return table(["ms", "median", "kernels alone", "of the limit"], lines)


def token_table(rows: Rows) -> str:
    fields = ("tokens_per_s", "median_ms", "host_ms", "kernels_ms", "kernels", "small_kernels_ms", "small_kernels")
    ratio = "speedup_over_losa, dense"
    lines = [
        [f"{r['model']}, {r['pattern']}, {r['implementation']}", *(r.get(f) for f in fields), r.get(ratio)]
        for r in rows
    ]
    header = ["a token", "tokens/s", "ms", "host ms", "kernels ms", "kernels", "below 4 us, ms", "their number"]
    return table([*header, "over dense"], lines)


TABLES: tuple[tuple[str, str, Callable[[Rows], str]], ...] = (
    ("Sparse decode", "sparse_linear", decode_table),
    ("Masked LoRA", "masked_lora", lora_table),
    ("Experts of a mixture", "experts", experts_table),
    ("SparseGPT and Wanda", "column_sweep", stage_table),
    ("Selection", "selection", stage_table),
    ("Hessian and factor", "hessian", stage_table),
    ("Decoding a model", "decode", token_table),
    ("A decode step's small operations", "decoder_step", way_table),
    ("Packing", "packing", way_table),
    ("Masks", "bitmask", way_table),
    ("CKA", "cka", way_table),
)


def measured(quantity: dict, benchmarks: dict[str, Rows]) -> float | None:
    """The quantity's value; see predictions.json's "source"."""
    rows, where, field = benchmarks.get(quantity["benchmark"], ()), quantity["where"], quantity["field"]
    value = value_of(rows, where, field)
    if "to" in quantity or "to_field" in quantity:
        other = value_of(rows, where | quantity.get("to", {}), quantity.get("to_field", field))
        if value is None or not other:
            return None
        value /= other
    return None if value is None else value * quantity.get("scale", 1)


def value_of(rows: Rows, where: dict, field: str) -> float | None:
    for row in rows:
        if all(row.get(key) == value for key, value in where.items()):
            return row.get(field)
    return None


def compared(predictions: dict, benchmarks: dict[str, Rows], document: dict) -> str:
    lines = []
    for quantity in predictions["predictions"]:
        value, goal, unit = measured(quantity, benchmarks), quantity.get("goal"), quantity.get("unit", "")
        reached = None
        if value is not None and goal is not None:
            reached = "yes" if (value >= goal if quantity["better"] == "more" else value <= goal) else "no"
        with_unit = [None if number is None else f"{number:.3g} {unit}".strip() for number in (value, goal)]
        predicted = quantity.get("predicted")
        predicted = None if predicted is None else f"{predicted:.3g} {unit}".strip()
        lines.append([quantity["what"], predicted, with_unit[0] or "not measured", with_unit[1], reached])
    card, here = predictions["card"], document.get("machine", {}).get("device")
    note = f"Predictions and goals are for an {card}." + ("" if here == card else f" This is an {here}.")
    return note + "\n\n" + table(["", "predicted", "measured", "goal", "reached"], lines)


def answers(questions: Sequence[dict], benchmarks: dict[str, Rows], smoke: Rows) -> str:
    lines = []
    for question in questions:
        if "smoke" in question:
            rows = [row for row in smoke if any(row["name"].startswith(name) for name in question["smoke"])]
            wrong = [row["name"] for row in rows if row["status"] != "PASS"]
            answer = "not asked" if not rows else "yes" if not wrong else f"no: {', '.join(wrong)}"
        else:
            value = measured(question, benchmarks)
            answer = "not measured" if value is None else f"{value:.2f}"
        lines.append([question["question"], question["predicted"], answer])
    return table(["", "predicted", "answer"], lines)


def failed(document: dict) -> Iterable[str]:
    for step in document.get("steps", []):
        if step["status"] not in ("ok", "no GPU"):
            yield f"step {step['step']}: {step['status']} {step['detail']}".rstrip()
    for row in document.get("smoke", []):
        if row["status"] != "PASS":
            yield f"{row['name']}: {row.get('message') or 'error {error:.2g}, allowed {allowed:.2g}'.format(**row)}"
    for step, names in document.get("failed_tests", {}).items():
        yield from (f"{step}: {name}" for name in names)
