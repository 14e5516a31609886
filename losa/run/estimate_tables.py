"""An estimate as tables: memory by phase, rounds, and work."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from rich.text import Text

from losa.run.estimate import Estimate
from losa.run.holding import PHASES, Holding

ALL_EXPERTS = "It is not known how many experts a token is sent to: the work is of all of them."


def estimate_tables(estimate: Estimate) -> list[Table]:
    """Memory by phase, rounds, and work."""
    return [memory_table(estimate), _rounds_table(estimate), _work_table(estimate)]


def memory_table(estimate: Estimate) -> Table:
    """What is held in each phase."""
    parameters = f"{estimate.parameters:,} parameters ({estimate.dtype})"
    table = plain_frame(
        f"{estimate.model}: {parameters}, {estimate.prunable:,} prunable in {estimate.blocks} blocks",
        "An estimate of what losa itself holds: allow a fifth more, and 1 GB on the host for Python and its libraries.",
    )
    _add_holdings(table, estimate.holdings, estimate.device)
    for place in ("device", "host"):
        if any(holding.place == place for holding in estimate.holdings):
            size, phase = estimate.peak(place)
            of = f" of {size_text(estimate.capacity[place])}" if place in estimate.capacity else ""
            where = estimate.device if place == "device" else "host"
            add_row(table, "peak", where, "all together", size_text(size) + of, f"throughout + {phase}")
    return table


def holdings_table(holdings: list[Holding], device: str) -> Table:
    """What a process holds in each phase. ``device``: the name of what it computes on."""
    table = plain_frame("what a process holds at most, by an estimate", None)
    _add_holdings(table, holdings, device)
    return table


def _add_holdings(table: Table, holdings: list[Holding], device: str) -> None:
    for column in ("phase", "where", "what", "size", "counted as"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for phase in PHASES:
        for holding in (holding for holding in holdings if holding.phase == phase):
            where = device if holding.place == "device" else "host"
            add_row(table, phase, where, holding.what, size_text(holding.size), holding.how)


def _rounds_table(estimate: Estimate) -> Table:
    open_end = not any(r.sequences for r in estimate.rounds)
    caption = "train.max_tokens is not set: the data's amount decides." if open_end and estimate.train_length else None
    table = plain_frame("rounds", caption)
    for column in ("round", "sparsity", "mean rank", "sequences", "tokens"):
        table.add_column(column, justify="right")
    for r in estimate.rounds:
        amounts = ("-", "-") if open_end else (f"{r.sequences:,}", f"{r.sequences * estimate.train_length:,}")
        add_row(table, str(r.index), f"{100 * r.sparsity:.1f} %", str(r.mean_rank), *amounts)
    return table


def _work_table(estimate: Estimate) -> Table:
    rate = "not measured" if estimate.rate is None else f"measured here: {estimate.rate / 1e12:.3g} TFLOP/s"
    caption = f"Matrix products alone, at the rate of plain ones ({rate}): a floor."
    if not estimate.routed:
        caption += f"\n{ALL_EXPERTS}"
    table = plain_frame("work", caption)
    for column in ("what", "FLOP", "time"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for stage in estimate.stages:
        add_row(table, stage.what, f"{stage.flops:.2e}", _duration(stage.flops, estimate.rate))
    add_row(table, "all counted", f"{estimate.flops:.2e}", _duration(estimate.flops, estimate.rate))
    return table


def plain_frame(title: str, caption: str | None) -> Table:
    # Text: brackets in a path are no markup.
    table = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.title, table.caption = Text(title), None if caption is None else Text(caption)
    return table


def add_row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def size_text(size: float) -> str:
    power = min(4, int(math.log(size, 1000))) if size else 0
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(flops: float, rate: float | None) -> str:
    return "-" if rate is None else time_text(flops / rate)


def time_text(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.1f} s" if minutes < 2 else f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
