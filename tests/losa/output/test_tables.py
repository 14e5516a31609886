"""Tables of a record."""

from __future__ import annotations

import io

from rich.console import Console

from losa.output.tables import blocks_table, plain_text, results_table, rounds_table, show_table
from losa.record import MethodResult, RoundRecord
from tests.helpers.records import BLOCKS, cells, make_record


def test_tables_hold_the_record():
    record = make_record()
    results = cells(results_table(record))
    assert results[0] == ["dense", "22.75", "0.00 %", "3", "0", "5 s"]
    assert results[1][1] == "113.25 (merged: 240.50)"
    assert results[2] == ["LoSA", "104.75", "70.00 %", "700", "600", "60 s"]
    rounds = cells(rounds_table(record))
    assert [row[0] for row in rounds] == ["1", "2", "3"]
    assert rounds[2][1:2] + rounds[2][3:] == ["70.00 %", "4.20", "3..6", "30", "2.875", "60.38", "22 s"]
    assert str(rounds_table(record).caption) == "time by stage: rates 4.5 s, train 60.8 s"
    record.rounds[2].train_label_loss = 3.5
    distilled = rounds_table(record)
    assert [str(column.header) for column in distilled.columns][6:8] == ["loss", "label loss"]
    assert [row[7] for row in cells(distilled)] == ["-", "-", "3.500"]
    blocks = cells(blocks_table(record))
    assert [row[0] for row in blocks] == record.blocks and [row[2] for row in blocks] == ["3", "4", "5", "6", "3"]


def test_tables_without_numbers():
    record = make_record(method="prune_only", evaluation=None, results=[MethodResult("dense", None, 0, 0, 9, 0.0)])
    record.rounds = [RoundRecord(1, 0.5, 8.0, [0.5] * BLOCKS, [8] * BLOCKS, keep_n=[2] * BLOCKS, m=4)]
    assert cells(results_table(record))[0][1] == "-" and results_table(record).caption is None
    record.unmasked = 3000
    assert "the written model's masks remove 17.50 % of all weights in its blocks" in str(results_table(record).caption)
    assert "no text to evaluate on" in str(results_table(record).title)
    assert cells(rounds_table(record))[0][2:] == ["50.0 %", "-", "-", "0", "-", "-", "0 s"]
    assert cells(blocks_table(record))[0][1:] == ["50.00 %", "-", "-", "-", "2:4"]
    record.rounds = []
    assert cells(blocks_table(record)) == []


def test_plain_text_is_ascii_and_never_cut():
    record = make_record(model="a/path [with] brackets/" + 40 * "long-name/")
    text = plain_text(results_table(record))
    assert text.isascii() and record.model in text.splitlines()[0]
    assert "| LoSA" in text and "113.25 (merged: 240.50)" in text
    file = io.StringIO()
    show_table(results_table(record), Console(file=file, width=40))
    assert file.getvalue().strip() == text.strip()


def test_terminal_gets_the_drawn_table():
    file = io.StringIO()
    show_table(rounds_table(make_record()), Console(file=file, width=120, force_terminal=True))
    assert "─" in file.getvalue() and "\x1b[" in file.getvalue()
