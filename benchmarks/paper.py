"""The paper's tables on a model and text of one's own: makes the runs of a table and prints it as Markdown.

--table may be repeated; without it all tables are made. Runs are those of the quality benchmark, in the same file:
finished ones are not repeated, and learning rates are tuned as there. The paper's own perplexities are beside ours;
they are of LLaMA-2-7B, so only their order can be compared.

--fill PAGE writes the tables of finished runs into a page, between the lines <!-- table NAME --> and <!-- end -->.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks._jobs import Job, headline
from benchmarks._paper_tables import Row, Table, tables
from benchmarks._results import plain_parser
from benchmarks._store import Store
from benchmarks.quality import add_options, current, make, merged, spread, tuning_table
from losa.storage.files import write_text

MISSING = "–"
PLACE = re.compile(r"(?<=^<!-- table )([\w-]+)( -->\n).*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def _middle(values: list[float], unit: str, scale: float = 1.0) -> str:
    return f"{statistics.median(values) / scale:,.{0 if scale == 1 else 1}f}{unit}"


# By name: what a column shows of a run, and how it shows the values of several seeds.
COLUMNS: dict[str, tuple[Callable[[dict], float | None], Callable[[list[float]], str]]] = {
    "perplexity": (headline, spread),
    "held-out text": (lambda run: run.get("held_out"), spread),
    "trained": (lambda run: run.get("parameters_trained"), lambda values: _middle(values, " M", 1e6)),
    "tokens": (lambda run: run.get("train_tokens"), lambda values: _middle(values, "")),
    "seconds": (lambda run: run.get("seconds"), lambda values: _middle(values, "")),
    "CPU seconds": (lambda run: run.get("cpu_seconds"), lambda values: _middle(values, "")),
    "memory": (lambda run: run.get("peak_bytes"), lambda values: _middle(values, " GB", 1e9)),
}


def markdown(table: Table, runs: dict) -> str:
    """The table of finished runs; what was not run is a dash. A row shows all of its seeds that there are. Below: the
    tokens of a short table, and how far the paper's order holds."""
    if table.kind == "tuning":
        return tuning_table(runs)
    notes = [_few_tokens(table, runs), _first_examples(table, runs), _order(table, runs)]
    return "\n\n".join([_rows(table, runs), " ".join(filter(None, notes))]).strip()


def _few_tokens(table: Table, runs: dict) -> str:
    short = [run for row in table.rows if row.job.short for run in row.found(runs, _seeds(runs))]
    tokens = max((run.get("train_tokens", 0) for run in short), default=0)
    return f"Runs that train have {tokens:,} tokens." if tokens else ""


def _first_examples(table: Table, runs: dict) -> str:
    """What the zero-shot tasks were cut to."""
    if table.kind != "tasks":
        return ""
    found = [run["task_limit"] for row in table.rows for run in row.found(runs, [0]) if "task_limit" in run]
    limits = ", ".join("all" if limit is None else f"the first {limit:,}" for limit in dict.fromkeys(found))
    return f"Examples of each task: {limits}." if limits else ""


def _seeds(runs: dict) -> list[int]:
    return sorted({int(seed) for key in runs for seed in re.findall(r"/seed(\d+)", key)})


def _rows(table: Table, runs: dict) -> str:
    if table.kind == "blocks":
        return _lines((*table.header, "rates of the blocks, from the first to the last"), _block_rows(table, runs))
    if table.kind == "tasks":
        names = _task_names(table, runs)
        return _lines((*table.header, *names, "mean"), _task_rows(table, runs, names))
    paper = any(row.paper is not None for row in table.rows)
    header = (*table.header, *table.columns, *(("paper, LLaMA-2-7B",) if paper else ()))
    seeds, rows = _seeds(runs), []
    for row in table.rows:
        found = [merged(run) if row.merged else run for run in row.found(runs, seeds)]
        cells = [_cell(found, *COLUMNS[name]) for name in table.columns]
        cells += [f"{row.paper:g}" if row.paper is not None else ""] if paper else []
        rows.append([*row.labels, *cells])
    return _lines(header, rows)


def _order(table: Table, runs: dict) -> str:
    """In how many pairs of rows ours are in the paper's order, on both texts. A pair is undecided where seeds that both
    have do not agree: they share calibration samples and the order of training."""
    if table.kind != "runs":
        return ""
    held, undecided, reversed_ = _pairs(table, runs, headline)
    if not (count := held + undecided + len(reversed_)):
        return ""
    text = f"Pairs in the paper's order: {held} of {count}"
    text += f", undecided {undecided}" if undecided else ""
    text += f"; reversed: {', '.join(reversed_)}." if reversed_ else "."
    others, undecided, elsewhere = _pairs(table, runs, lambda run: run.get("held_out"))
    if count := others + undecided + len(elsewhere):
        text += f" On the held-out text {others} of {count}"
        text += f", undecided {undecided}." if undecided else "."
    return text


def _pairs(table: Table, runs: dict, value_of: Callable[[dict], float | None]) -> tuple[int, int, list[str]]:
    """How many pairs of rows are in the paper's order and how many are undecided, and the names of the others."""
    seeds = _seeds(runs)
    rows = []
    for row in table.rows:
        found = row.by_seed(runs, seeds).items()
        values = {seed: value for seed, run in found if (value := value_of(run)) is not None}
        if row.paper is not None and values:
            rows.append((row.paper, row.labels, values))
    held, undecided, reversed_ = 0, 0, []
    for (paper, labels, ours), (other_paper, other_labels, others) in itertools.combinations(
        sorted(rows, key=lambda row: row[:2]), 2
    ):
        differs = sum(map(str.__ne__, labels, other_labels))
        if paper == other_paper or (table.compared == "in one label" and differs != 1):
            continue
        shared = ours.keys() & others.keys()
        if not shared:
            continue
        if all(ours[seed] < others[seed] for seed in shared):
            held += 1
        elif all(others[seed] < ours[seed] for seed in shared):
            names = (_name(table.header, each) for each in (labels, other_labels))
            reversed_.append(" after ".join(names))
        else:
            undecided += 1
    return held, undecided, reversed_


def _name(header: tuple[str, ...], labels: tuple[str, ...]) -> str:
    """Of a row: its labels, and of those that are "yes" what they are about."""
    told = (head if label == "yes" else label for head, label in zip(header, labels, strict=True) if label)
    return " ".join(told) or "none"


def _cell(found: list[dict], value_of: Callable, shown: Callable) -> str:
    if found and all(run.get("failed") for run in found):
        return "diverged"
    values = [value for run in found if not run.get("failed") and (value := value_of(run)) is not None]
    return shown(values) if values else MISSING


def _lines(header: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def _block_rows(table: Table, runs: dict) -> list[list[str]]:
    rows = []
    for row in table.rows:
        rounds = [run["rounds"] for run in row.found(runs, [0]) if "rounds" in run]
        rates = " ".join(f"{100 * rate:.0f}" for rate in rounds[0][-1]["sparsity"]) if rounds else MISSING
        rows.append([*row.labels, rates])
    return rows


def _tasks(row: Row, runs: dict) -> dict[str, dict[str, float]]:
    return next((run["tasks"] for run in row.found(runs, [0]) if "tasks" in run), {})


def _task_names(table: Table, runs: dict) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for name in _tasks(row, runs)))


def _task_rows(table: Table, runs: dict, names: list[str]) -> list[list[str]]:
    """Accuracies in per cent, with standard errors; the mean's takes the tasks as independent."""
    rows = []
    for row in table.rows:
        found = _tasks(row, runs)
        cells = [
            _accuracy(found[name]["acc"], found[name]["acc_stderr"]) if name in found else MISSING for name in names
        ]
        mean = MISSING
        if found:
            error = sum(task["acc_stderr"] ** 2 for task in found.values()) ** 0.5 / len(found)
            mean = _accuracy(statistics.mean(task["acc"] for task in found.values()), error)
        rows.append([*row.labels, *cells, mean])
    return rows


def _accuracy(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def filled(page: str, runs: dict) -> str:
    """A page with the tables of ``runs`` in their places. Raises KeyError: it asks for a table that there is not."""
    known = tables()
    return PLACE.sub(lambda found: f"{found[1]}{found[2]}{markdown(known[found[1]], runs)}\n", page)


def jobs_of(chosen: list[Table], seeds: int) -> Iterator[Job]:
    """Each run once, in the order of the tables."""
    found = (job for table in chosen for row in table.rows for job in row.jobs(seeds))
    yield from {job.key: job for job in found}.values()


def main(argv: list[str]) -> int:
    known = tables()
    parser = plain_parser("paper", __doc__)
    add_options(parser)
    parser.add_argument("--table", action="append", choices=list(known), help="may be repeated; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="at most, of rows that have several; default: %(default)s")
    parser.add_argument("--print", action="store_true", help="print the tables of finished runs and stop")
    parser.add_argument(
        "--fill", type=Path, metavar="PAGE", help="write the tables of finished runs into a page and stop"
    )
    args = parser.parse_args(argv)
    chosen = [known[name] for name in args.table or known]
    if args.print or args.fill is not None:
        if args.out is None:
            parser.error("--print and --fill: expected --out")
        runs, code = current(Store(args.out, "paper")), 0
    else:
        jobs = [
            job for job in jobs_of(chosen, args.seeds) if not args.only or any(text in job.key for text in args.only)
        ]
        runs, code = make(args, jobs, "paper")
    if args.fill is not None:
        write_text(args.fill, filled(args.fill.read_text(), runs))
        return 0
    if not args.dry_run:
        for table in chosen:
            print(f"## {table.title}\n\n{markdown(table, runs)}\n")
    return code
