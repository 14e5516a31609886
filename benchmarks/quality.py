"""Does LoSA beat its baselines at equal training tokens? Perplexity of merged models over methods, seeds, pruners.

Every finished run is written to --out at once, and runs found there are not repeated, so that a comparison of many
hours can be stopped and resumed, and several commands may fill one file. Learning rates are tuned per method and
sparsity, with a third of the tokens, on other text than the text that is reported. Runs of other settings than today's
are stale: they are named, count nowhere, and are made anew.

Without a choice of runs all runs of the comparison are made. --method, --pruner, --sparsity and --seed choose others,
all combinations; --variant NAME with --set KEY=VALUE changes their recipe, and is part of their names. With --tuning
the chosen runs are tuned only, at --rate or over the learning rates; a variant that was tuned takes its own rate later.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import _models
from benchmarks._harness import TASKS, Setting, run_job
from benchmarks._jobs import (
    ADAPTER_RATES,
    BEST,
    DENSE,
    FULL_RATES,
    Budget,
    Job,
    headline,
    job_of,
    missing,
    rates_to_try,
    seeds_of,
    stale,
)
from benchmarks._machine import machine, origin
from benchmarks._results import plain_parser
from benchmarks._store import Store, processes, work
from losa.cli.recipes import parse_settings
from losa.errors import RecipeError

METHODS = ("prune_only", "losa", BEST, "lora", "sparse_lora", "sparse_full", "adalora", "sora")


def final_jobs() -> list[Job]:
    """The comparison: all methods at 70 %, the most telling ones at 60 and 50 %, and with the other pruners."""
    jobs = [Job(DENSE), *(Job(m) for m in METHODS)]
    jobs += [Job(m, sparsity=s) for s in (0.6, 0.5) for m in ("prune_only", "losa", BEST, "lora", "sparse_full")]
    jobs += [Job(m, p) for p in ("sparsegpt", "alps", "pruner_zero") for m in ("prune_only", "losa", BEST, "lora")]
    return [replace(job, seed=seed) for job in jobs for seed in range(seeds_of(job))]


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """All combinations of what the options name; without any the comparison."""
    try:
        overrides = parse_settings(args.set)
    except RecipeError as error:
        raise SystemExit(f"quality: {error}") from error
    options = (args.method, args.pruner, args.sparsity, args.seed)
    if not any(options) and not args.variant and not args.tuning:
        jobs = final_jobs()
    else:
        names = (args.method or METHODS, args.pruner or ["wanda"], args.sparsity or [0.7], args.seed or [0])
        chosen = itertools.product(*(list(dict.fromkeys(values)) for values in names))
        jobs = [Job(*each, variant=args.variant, overrides=overrides) for each in chosen]
    jobs = [replace(job, learning_rate=args.rate if job.trains else None, tuning=args.tuning) for job in jobs]
    if args.tuning:
        jobs = [job for job in jobs if job.trains]
    return [job for job in jobs if not args.only or any(text in job.key for text in args.only)]


def summary(runs: dict) -> dict[str, list[float]]:
    """Perplexities over seeds, by 'METHOD/PRUNER/SPARSITY': finished runs of the comparison, without variants.

    ``lora`` is judged unmerged; ``lora_masked`` is the same run merged under the mask.
    """
    found: dict[str, dict[int, float]] = {}
    for key, run in runs.items():
        match key.split("/"):
            case [method, pruner, sparsity, seed] if ":" not in sparsity and not run.get("failed"):
                values = {method: headline(run)}
                if method == "lora":
                    values["lora_masked"] = run["perplexity"]
                for name, value in values.items():
                    found.setdefault(f"{name}/{pruner}/{sparsity}", {})[int(seed.removeprefix("seed"))] = value
    return {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in sorted(found.items())}


def table(runs: dict) -> str:
    """Markdown: means over seeds (and the spread where there are several), with what they cost."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for key, run in runs.items():
        match key.split("/"):
            case [method, pruner, sparsity, _, *more] if not (run.get("failed") or more[-1:] and "tune-" in more[-1]):
                groups.setdefault((pruner, sparsity, " ".join([method, *more])), []).append(run)
                if method == "lora":
                    groups.setdefault((pruner, sparsity, " ".join(["lora_masked", *more])), []).append(merged(run))
    lines = [
        "| pruner | sparsity | method | perplexity | held-out text | learning rate | trained | tokens | s | seeds |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for (pruner, sparsity, name), group in sorted(groups.items(), key=lambda item: (*item[0][:2], mean(item[1]))):
        first = group[0]
        held_out = [value for run in group if (value := run.get("held_out")) is not None]
        trained = first.get("parameters_trained", 0)
        cells = [
            pruner,
            sparsity,
            name,
            spread([headline(run) for run in group]),
            spread(held_out),
            f"{first['learning_rate']:g}" if trained and "learning_rate" in first else "",
            f"{trained / 1e6:.1f} M" if trained else "",
            f"{first.get('train_tokens', 0):,}",
            f"{statistics.mean(run['seconds'] for run in group):.0f}",
            str(len(group)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def merged(run: dict) -> dict:
    """A run judged by its merged model, which solved no tasks."""
    left = {key: value for key, value in run.items() if key not in ("perplexity_unmerged", "held_out", "tasks")}
    return left | ({"held_out": run["held_out_merged"]} if "held_out_merged" in run else {})


def tuning_table(runs: dict) -> str:
    """Markdown: perplexities of tuning runs by learning rate, and the best rate where its neighbours are worse."""
    groups: dict[tuple[str, ...], dict[float, float]] = {}
    rates: dict[tuple[str, ...], tuple[float, ...]] = {}
    for key, run in sorted(runs.items()):
        job = job_of(key, run)
        if job is not None and job.tuning and job.learning_rate is not None:
            name = tuple(replace(job, learning_rate=None).key.removesuffix("/tune").split("/", 3))
            groups.setdefault(name, {})[job.learning_rate] = headline(run)
            rates[name] = job.rates
    lines = ["| method | pruner | sparsity | run | learning rate: perplexity | chosen |", "|---|---|---|---|---|---|"]
    for name, found in groups.items():
        best = min(found, key=found.__getitem__)
        chosen = f"{best:g}"
        if best not in rates[name] or rates_to_try(found, rates[name], best):
            chosen = ""  # a rate of one's own choice, or a search that has not ended
        elif best in (rates[name][0], rates[name][-1]):
            chosen += " (edge of the grid)"
        tried = ", ".join(f"{rate:g}: {value:.1f}" for rate, value in sorted(found.items()))
        lines.append(f"| {' | '.join([*name, tried, chosen])} |")
    return "\n".join(lines)


def mean(group: list[dict]) -> float:
    return statistics.mean(headline(run) for run in group)


def spread(values: list[float]) -> str:
    """The mean, and least and largest of several."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f}..{max(values):.1f})"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a command needs that makes runs of this kind."""
    _models.add_model_option(parser)
    parser.add_argument("--data", type=Path, help="folder with calib/, ft/ and dev/ (docs/results.md)")
    parser.add_argument("--out", type=Path, help="JSON file; finished runs in it are kept")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each in a process of its own")
    parser.add_argument("--tokens", type=int, default=Budget.tokens, help="of training; default: %(default)s")
    parser.add_argument("--windows", type=int, default=Budget.windows, help="evaluation windows; default: %(default)s")
    parser.add_argument("--only", action="append", help="run only jobs whose key contains this text; may be repeated")
    parser.add_argument(
        "--limit",
        type=lambda text: None if text == "all" else int(text),
        default=250,
        help="the first examples of each zero-shot task, a number or all; 0 for no tasks; default: %(default)s",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the names of the runs that are missing, and stop")


def current(store: Store) -> dict:
    """The finished runs of a file. Runs of another recipe are named and left out. Raises SystemExit: no such file."""
    runs = store.read()["runs"]
    old = stale(runs)
    for key in old:
        print(f"{store.command}: stale, of other settings than today's: {key}", file=sys.stderr)
    return {key: run for key, run in runs.items() if key not in old}


def make(args: argparse.Namespace, jobs: list[Job], command: str) -> tuple[dict, int]:
    """Make the jobs that --out lacks, the first seed of all before the second: all finished runs of the file, and the
    exit code."""
    if args.data is None or args.out is None:
        raise SystemExit(f"{command}: expected --data and --out")
    jobs = sorted(jobs, key=lambda job: job.seed)
    if (args.data / TASKS).is_dir():
        jobs = [replace(job, task_limit=args.limit) if job.of_tasks else job for job in jobs]
    store = Store(args.out, command)
    earlier = store.read(new=True)
    wanted = missing(jobs, earlier["runs"])
    if args.dry_run:
        print(*(f"{key} (stale)" if key in earlier["runs"] else key for key in wanted), sep="\n")
        return earlier["runs"], 0
    budget = Budget(tokens=args.tokens, short_tokens=args.tokens // 3, windows=args.windows)
    shared = {
        "setup": setup_of(_models.source(args.model), budget),
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "origin": origin(earlier.get("origin", {}) if earlier["runs"] else None),
    }
    store.check_setup(earlier, shared)
    failed: dict[str, str] = {}
    if wanted:
        tasks = any(job.task_limit != 0 and job.key in wanted for job in jobs)
        if tasks and importlib.util.find_spec("lm_eval") is None:
            raise SystemExit(f"{command}: zero-shot tasks need lm-eval: pip install 'losa[eval]', or --limit 0")
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(_models.on_disk(args.model, Path(folder)), args.data.resolve(), budget)
            with processes(args.jobs, partial(run_job, setting=setting)) as start:
                failed = work(store, shared, jobs, start, args.jobs)
    runs = current(store)
    for key, error in sorted(failed.items()):
        print(f"{command}: failed: {key}: {error}", file=sys.stderr)
    if left := missing(jobs, runs):
        print(f"{command}: {len(left)} runs were not made", file=sys.stderr)
    return runs, 1 if failed else 0


def setup_of(model: str, budget: Budget) -> dict:
    """What the runs of a file have in common; runs of another setup do not belong in it."""
    return {
        "model": model,
        "training_tokens": budget.tokens,
        "tuning_tokens": budget.short_tokens,
        "evaluation": f"WikiText-2 raw validation, length {budget.window}, first {budget.windows} windows",
        "held_out": f"C4 validation, length {budget.window}, first {max(1, budget.windows // 2)} windows",
        "training": f"dolly + alpaca_gpt4, loss on all tokens, steps of {budget.length} tokens, warm-up 0.1, "
        "bfloat16 autocast where the CPU has it",
        "calibration": f"C4, {budget.samples} x {budget.length} tokens",
        "grid": [list(ADAPTER_RATES), list(FULL_RATES)],
    }


def main(argv: list[str]) -> int:
    parser = plain_parser("quality", __doc__)
    add_options(parser)
    parser.add_argument("--method", action="append", help="may be repeated, as the next three")
    parser.add_argument("--pruner", action="append")
    parser.add_argument("--sparsity", action="append", type=_sparsity, help="a share, or a pattern such as 2:4")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--variant", default="", help="name of the settings of --set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe setting of the variant")
    parser.add_argument("--rate", type=float, help="learning rate, instead of the tuned one")
    parser.add_argument("--tuning", action="store_true", help="tune only")
    parser.add_argument(
        "--table", action="store_true", help="print the finished runs, with --tuning the tuning, and stop"
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="print a file's perplexities as JSON and stop")
    args = parser.parse_args(argv)
    if bool(args.variant) != bool(args.set) or "/" in args.variant:
        parser.error("--variant and --set: expected both or neither, and a name without '/'")
    if args.summary is not None:
        print(json.dumps(summary(current(Store(args.summary, "quality")))))
        return 0
    if args.table:
        if args.out is None:
            parser.error("--table: expected --out")
        runs, code = current(Store(args.out, "quality")), 0
    else:
        runs, code = make(args, chosen_jobs(args), "quality")
    if not args.dry_run:
        print((tuning_table if args.tuning else table)(runs))
    return code


def _sparsity(text: str) -> float | str:
    if ":" in text:
        return text
    share = float(text)
    if round(share, 2) != share:
        raise argparse.ArgumentTypeError(
            f"expected a share of at most two decimals, by which runs are named, got {text}"
        )
    return share
