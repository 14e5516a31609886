"""A plan as tables: memory by phase, rounds, and work."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from rich.text import Text

from losa.run.estimate import PHASES, Plan


def plan_tables(plan: Plan) -> list[Table]:
    """Memory by phase, rounds, and work."""
    return [_memory_table(plan), _rounds_table(plan), _work_table(plan)]


def _memory_table(plan: Plan) -> Table:
    counts = f"{plan.parameters:,} parameters ({plan.dtype}), {plan.prunable:,} prunable in {plan.blocks} blocks"
    table = _table(
        f"{plan.model}: {counts}",
        "An estimate of what losa itself holds: allow a fifth more, and 1 GB on the host for Python and its libraries.",
    )
    for column in ("phase", "where", "what", "size", "counted as"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for phase in PHASES:
        for part in (part for part in plan.parts if part.phase == phase):
            _add(table, phase, _where(plan, part.place), part.what, _size(part.size), part.how)
    for place in ("device", "host"):
        if any(part.place == place for part in plan.parts):
            size, phase = plan.peak(place)
            of = f" of {_size(plan.capacity[place])}" if place in plan.capacity else ""
            _add(table, "peak", _where(plan, place), "all together", _size(size) + of, f"throughout + {phase}")
    return table


def _rounds_table(plan: Plan) -> Table:
    open_end = not any(r.sequences for r in plan.rounds)
    caption = "train.max_tokens is not set: the data's amount decides." if open_end and plan.train_length else None
    table = _table("rounds", caption)
    for column in ("round", "sparsity", "mean rank", "sequences", "tokens"):
        table.add_column(column, justify="right")
    for r in plan.rounds:
        amounts = ("-", "-") if open_end else (f"{r.sequences:,}", f"{r.sequences * plan.train_length:,}")
        _add(table, str(r.index), f"{100 * r.sparsity:.1f} %", str(r.mean_rank), *amounts)
    return table


def _work_table(plan: Plan) -> Table:
    rate = "not measured" if plan.rate is None else f"measured here: {plan.rate / 1e12:.3g} TFLOP/s"
    caption = f"Matrix products alone, at the rate of plain ones ({rate}): a floor."
    table = _table("work", caption)
    for column in ("what", "FLOP", "time"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for stage in plan.stages:
        _add(table, stage.what, f"{stage.flops:.2e}", _duration(stage.flops, plan.rate))
    _add(table, "all counted", f"{plan.flops:.2e}", _duration(plan.flops, plan.rate))
    return table


def _table(title: str, caption: str | None) -> Table:
    # Text: brackets in a path are no markup.
    table = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.title, table.caption = Text(title), None if caption is None else Text(caption)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _where(plan: Plan, place: str) -> str:
    return plan.device if place == "device" else "host"


def _size(size: int) -> str:
    power = min(4, int(math.log(size, 1000))) if size else 0
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(flops: float, rate: float | None) -> str:
    if rate is None:
        return "-"
    minutes = flops / rate / 60
    return (
        f"{60 * minutes:.1f} s" if minutes < 2 else f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    )
