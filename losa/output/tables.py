"""Tables of a run and of a checkpoint's zeros."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from losa.output.inspection import BLOCK_WEIGHT, Inspection, TensorSparsity
from losa.recipe.methods import method_label
from losa.record import MethodResult, RunRecord, ShrunkRecord


def _table(*columns: str, title: str | None = None, caption: str | None = None) -> Table:
    """The first column holds names, every other column numbers."""
    table = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    # Text, here and in the rows: brackets in a path are no markup.
    table.title, table.caption = (None if text is None else Text(text) for text in (title, caption))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def percent(value: float, digits: int = 2) -> str:
    """A share, 0 to 1, as a cell: "70.00 %"."""
    return f"{100 * value:.{digits}f} %"


def shrunk_weights(shrunk: ShrunkRecord, left: int) -> str:
    """How much a structured pruner took away. ``left``: weights of the matrices that it has pruned."""
    total = left + shrunk.removed
    share = percent(shrunk.removed / total)
    return f"{shrunk.removed:,} of {total:,} weights are gone with whole heads and channels ({share})"


def _span(values: list, show) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low}..{high}"


def show_table(table: Table, console: Console) -> None:
    """Print a table: drawn in a terminal, as plain text that is never cut or wrapped anywhere else."""
    if console.is_terminal:
        console.print(table)
    else:
        console.print(plain_text(table), markup=False, highlight=False, soft_wrap=True)


def plain_text(table: Table) -> str:
    """A table in Markdown, ASCII borders, as wide as it needs to be; its title and caption are lines of text."""
    title = [str(table.title), ""] if table.title else []
    caption = ["", str(table.caption)] if table.caption else []
    return "\n".join([*title, *markdown(table), *caption, ""])


def markdown(table: Table) -> list[str]:
    """The lines of a table in Markdown, without its title and caption."""
    bare = Table(*table.columns, box=box.MARKDOWN)
    bare.rows.extend(table.rows)
    written = io.StringIO()
    console = Console(file=written, width=10_000, color_system=None, force_terminal=False)
    console.print(bare)
    lines = [line.strip() for line in written.getvalue().splitlines() if line.strip()]
    # rich leaves alignment out of the rule.
    right = [column.justify == "right" for column in table.columns]
    rules = lines[1].strip("|").split("|")
    lines[1] = "|".join(["", *(r[:-1] + ":" if numeric else r for r, numeric in zip(rules, right, strict=True)), ""])
    return lines


def results_table(record: RunRecord) -> Table:
    """A row per method. A method that cannot be merged has the unmerged model's perplexity, with the merged model's
    perplexity beside it."""
    caption = None
    if record.masks and record.shrunk is None and record.leaves_dense:
        share = f"{percent(record.sparsity_of_blocks)} of all weights in its blocks"
        caption = f"sparsity: of the linears that can be pruned; the written model's masks remove {share}"
    columns = ("model", "perplexity", "sparsity", "zeros", "trained tokens", "time")
    table = _table(*columns, title=protocol(record), caption=caption)
    for r in record.results:
        _add(
            table,
            method_label(r.method),
            _perplexity(r),
            percent(r.sparsity),
            _zeros(r, record),
            f"{r.train_tokens:,}",
            f"{r.seconds:,.0f} s",
        )
    return table


def _zeros(result: MethodResult, record: RunRecord) -> str:
    if record.shrunk is None or result.method != record.method:
        return f"{result.zeros:,}"
    return f"{result.zeros:,} ({record.shrunk.removed:,} removed)"


def _perplexity(result: MethodResult) -> str:
    if result.perplexity_unmerged is None:
        return _number(result.perplexity)
    return f"{_number(result.perplexity_unmerged)} (merged: {_number(result.perplexity)})"


def protocol(record: RunRecord) -> str:
    """How perplexities were measured: text, window length, windows, tokens."""
    if record.evaluation is None:
        return f"{record.model}: no text to evaluate on was given"
    e = record.evaluation
    path, parts = e["data"]["path"], []
    # Subset and split mean something for data sets of the hub only.
    if not (path.startswith("builtin:") or Path(path).suffix or os.path.exists(path)):
        parts = [e["data"][key] for key in ("subset", "split") if e["data"].get(key)]
    text = f"{' '.join([path, *parts])}, {e['windows']} non-overlapping windows of {e['length']} tokens"
    if e.get("bos_per_window"):
        text += " that begin with the beginning-of-text token"
    return f"{record.model}: perplexity on {text} ({e['tokens']:,} in all)"


def rounds_table(record: RunRecord) -> Table:
    """A row per round: sparsity, ranks, loss, perplexity, time; where the time went is below."""
    stages: dict[str, float] = {}
    for r in record.rounds:
        for stage, value in r.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + value
    spent = ", ".join(f"{stage} {value:,.1f} s" for stage, value in stages.items())
    distilled = any(r.train_label_loss is not None for r in record.rounds)
    losses = ("loss", "label loss") if distilled else ("loss",)
    columns = ("round", "sparsity", "blocks", "mean rank", "ranks", "steps", *losses, "perplexity", "time")
    table = _table(*columns, caption=f"time by stage: {spent}" if spent else None)
    ranked = record.ranked
    for r in record.rounds:
        _add(
            table,
            str(r.index),
            percent(r.target_sparsity),
            _span(r.sparsity, lambda value: f"{100 * value:.1f}") + " %",
            f"{sum(r.ranks) / len(r.ranks):.2f}" if ranked and r.ranks else "-",
            _span(r.ranks, str) if ranked and r.ranks else "-",
            str(r.train_steps),
            _number(r.train_loss, 3),
            *((_number(r.train_label_loss, 3),) if distilled else ()),
            _number(r.perplexity),
            f"{sum(r.seconds.values()):,.0f} s",
        )
    return table


def blocks_table(record: RunRecord) -> Table:
    """A row per block, as the last round left it."""
    columns = ["block", "sparsity", "rank", "error", "importance"]
    last = record.rounds[-1] if record.rounds else None
    if last is not None and last.keep_n is not None:
        columns.append("kept")
    table = _table(*columns)
    if last is None:
        return table
    for index, name in enumerate(record.blocks):
        cells = [
            name,
            percent(last.sparsity[index]),
            "-" if not record.ranked or not last.ranks else str(last.ranks[index]),
            "-" if last.errors is None else f"{last.errors[index]:.3g}",
            "-" if last.importance is None else f"{last.importance[index]:.4f}",
        ]
        if last.keep_n is not None:
            cells.append(f"{last.keep_n[index]}:{last.m}")
        _add(table, *cells)
    return table


def zeros_table(inspection: Inspection) -> Table:
    """A row per block with the sparsity measured in the files."""
    blocks: dict[tuple[str, int], list[TensorSparsity]] = {}
    for tensor in inspection.tensors:
        if (found := BLOCK_WEIGHT.fullmatch(tensor.name)) is not None:
            prefix, _, number = found[1].rpartition(".")
            blocks.setdefault((prefix, int(number)), []).append(tensor)
    lost = inspection.lost_zeros
    notes = [f"{len(lost)} matrices have lost zeros since losa wrote them: {lost[0]}, ..."] if lost else []
    if inspection.unchecked is not None:
        notes.append(f"shapes were not checked against a model: {inspection.unchecked}")
    if inspection.record is not None and inspection.record.shrunk is not None:
        notes.append(shrunk_weights(inspection.record.shrunk, sum(t.total for t in inspection.tensors)))
    where = "packed files" if inspection.packed else "files"
    table = _table(
        "block",
        "matrices",
        "weights",
        "zeros",
        "sparsity",
        title=f"measured in the {where}: {percent(inspection.sparsity)} zeros",
        caption="\n".join(notes) or None,
    )
    for (prefix, number), parts in sorted(blocks.items()):
        zeros, total = sum(t.zeros for t in parts), sum(t.total for t in parts)
        _add(table, f"{prefix}.{number}", str(len(parts)), f"{total:,}", f"{zeros:,}", percent(zeros / total))
    return table
