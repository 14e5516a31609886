"""The runs of the quality benchmark and of the paper's tables: what each one is, and how its learning rate is found."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from losa.recipe.methods import find_method
from losa.recipe.reading import override, read_settings

# Full fine-tuning takes about a tenth of an adapter's learning rate.
ADAPTER_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FULL_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
TUNED_AT = (0.7, 0.5)
SEEDS = 3  # of what the comparison is about, see seeds_of
DENSE, BEST = "dense", "best"
BEST_RECIPE = Path(__file__).parents[1] / "examples/smollm2-best.yaml"
# What a recipe decides about a method. Data, budget and learning rate are the harness's, for all methods alike.
SECTIONS = ("method", "prune", "rounds", "allocation", "lora", "train", "reconstruct")
BUDGETED = (
    "data",
    "length",
    "batch_size",
    "gradient_accumulation",
    "max_tokens",
    "learning_rate",
    "train_on",
    "precision",
)

Settings = dict[str, object]
"""Recipe settings by dotted name."""


@dataclass(frozen=True)
class Budget:
    """What every run gets alike: tokens of training, of a sequence, of a window; samples. ``short_tokens``: of training
    in tuning runs and in the ablations of the paper's tables."""

    tokens: int = 61_440
    short_tokens: int = 20_480
    length: int = 256
    samples: int = 16
    windows: int = 48
    window: int = 512


@dataclass(frozen=True)
class Job:
    """One run.

    ``method``: a recipe's method, ``best`` (the settings of examples/smollm2-best.yaml) or ``dense`` (no run: the model
    as it is). ``sparsity``: a share, or a pattern such as "2:4". ``variant`` names ``overrides``. ``learning_rate``:
    None is the tuned one. ``short``: with the budget's ``short_tokens``. ``tuning``: short too, judged on other text.
    ``task_limit``: examples of each zero-shot task, None for all, 0 for no tasks; no part of the run's name.
    """

    method: str
    pruner: str = "wanda"
    sparsity: float | str = 0.7
    seed: int = 0
    variant: str = ""
    overrides: Settings = field(default_factory=dict)
    learning_rate: float | None = None
    tuning: bool = False
    short: bool = False
    task_limit: int | None = 0

    @property
    def key(self) -> str:
        """The run's name in the file of results."""
        if self.method == DENSE:
            parts = [DENSE]
        else:
            parts = [self.method, self.pruner, sparsity_name(self.sparsity), f"seed{self.seed}"]
        parts += [self.variant] if self.variant else []
        parts += ["short"] if self.short else []
        rate = [] if self.learning_rate is None else [f"lr{self.learning_rate:g}"]
        parts += ["-".join(["tune", *rate])] if self.tuning else rate
        return "/".join(parts)

    @property
    def of_tasks(self) -> bool:
        """Whether it is one of the runs of the table of zero-shot tasks."""
        if self.method == DENSE:
            return True
        plain = not (self.variant or self.short or self.tuning) and self.learning_rate is None
        at_50 = (self.pruner, self.sparsity, self.seed) == ("wanda", 0.5, 0)
        return plain and at_50 and self.method in ("prune_only", "lora", "losa", BEST)

    @property
    def trains(self) -> bool:
        method = find_method(self.method)
        return self.method != DENSE and (method is None or method.trains)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates among which the method's is tuned."""
        return FULL_RATES if self.method == "sparse_full" else ADAPTER_RATES


def job_of(key: str, run: dict) -> Job | None:
    """The job whose run has that key; None: no job has such a key."""
    match key.split("/"):
        case ["dense"]:
            return Job(DENSE)
        case [method, pruner, sparsity, seed, *more] if re.fullmatch(
            r"(\d+:\d+|\d\.\d\d) seed\d+", f"{sparsity} {seed}"
        ):
            tuning, rate = False, None
            if more and (more[-1].startswith("lr") or more[-1].startswith("tune-lr")):
                tuning, rate = more[-1].startswith("tune"), run.get("learning_rate")
                more = more[:-1]
            short = more[-1:] == ["short"]
            job = Job(
                method,
                pruner,
                sparsity if ":" in sparsity else float(sparsity),
                int(seed.removeprefix("seed")),
                "/".join(more[:-1] if short else more),
                run.get("overrides", {}),
                rate,
                tuning,
                short,
            )
            return job if job.key == key else None
    return None


def seeds_of(job: Job) -> int:
    """How many seeds a run has: three at 70 %, and where the best recipe is judged."""
    judged = job.method == BEST and job.pruner == "wanda" and not job.short and job.sparsity in (0.5, 0.6)
    return SEEDS if job.method != DENSE and (job.sparsity == 0.7 or judged) else 1


def base_settings(job: Job) -> dict:
    """The recipe's sections that decide a run, without data, budget and the job's overrides."""
    if job.method == DENSE:  # one run, whatever the table asks for it beside
        job = Job(DENSE)
    settings: dict = {"method": "prune_only" if job.method == DENSE else job.method}
    if job.method == BEST:
        settings = copy.deepcopy(_best(BEST_RECIPE, BEST_RECIPE.stat().st_mtime_ns))
    settings.setdefault("train", {}).setdefault("warmup", 0.1)
    pattern = isinstance(job.sparsity, str)
    return override(
        settings,
        {
            "prune.pruner": job.pruner,
            "prune.sparsity": None if pattern else job.sparsity,
            "prune.pattern": job.sparsity if pattern else None,
        },
    )


@functools.lru_cache
def _best(path: Path, changed: int) -> dict:
    return best_settings(read_settings(path))


def best_settings(recipe: dict) -> dict:
    """What a recipe says of a method, without data and budget: of calibration, how many samples serve rates."""
    chosen = {name: recipe[name] for name in SECTIONS if recipe.get(name) is not None}
    if (compared := recipe.get("calibration", {}).get("cka_samples")) is not None:
        chosen["calibration"] = {"cka_samples": compared}
    if "train" in chosen:
        chosen["train"] = {key: value for key, value in chosen["train"].items() if key not in BUDGETED}
    return chosen


def digest(job: Job) -> str:
    """Eight characters for the settings that decide a run: a run with another digest is of another recipe."""
    text = json.dumps([base_settings(job), job.overrides], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def finished(job: Job, runs: dict) -> bool:
    """Whether ``runs`` has the job's run, made with the settings, the learning rate and the tasks that it would have
    now.

    A run without a digest is taken as it is, and so is a run's rate while its tuning is not finished."""
    run = runs.get(job.key)
    if run is None or "settings" not in run:
        return run is not None
    if run["settings"] != digest(job) or (job.task_limit != 0 and run.get("task_limit", 0) != job.task_limit):
        return False
    rate, found = tuned_rate(job, runs), run.get("learning_rate")
    return not job.trains or None in (rate, found) or math.isclose(rate, found)


def stale(runs: dict) -> list[str]:
    """Keys of runs that were made with other settings, or at another learning rate, than they would be made with now.
    They count nowhere, and are made anew when they are asked for."""
    jobs = {key: job_of(key, run) for key, run in runs.items()}
    return sorted(key for key, job in jobs.items() if job is not None and not finished(job, runs))


def sparsity_name(sparsity: float | str) -> str:
    return sparsity if isinstance(sparsity, str) else f"{sparsity:.2f}"


def headline(run: dict) -> float:
    """The perplexity by which a run is judged: of the merged model, or of the unmerged one where merging changes the
    function. Infinite for a run whose numerics failed."""
    if run.get("failed"):
        return math.inf
    unmerged = run.get("perplexity_unmerged")
    return run["perplexity"] if unmerged is None else unmerged


def tuning_of(job: Job) -> list[Job]:
    """The tunings that may tell the job's learning rate, best first, as jobs without a rate: the job's own and its
    variant's, which are made on demand, and its method's.

    A method is tuned with Wanda and seed 0 at the nearest of ``TUNED_AT``."""
    kept, _, of = sparsity_name(job.sparsity).partition(":")
    share = 1 - int(kept) / int(of) if of else float(kept)
    own = replace(job, seed=0, learning_rate=None, tuning=True, short=False, task_limit=0)
    # Rounded, so that of two that are as near the first is taken.
    variant = replace(own, pruner="wanda", sparsity=min(TUNED_AT, key=lambda tuned: round(abs(tuned - share), 6)))
    return [own, variant, replace(variant, variant="", overrides={})]


def scores(job: Job, runs: dict) -> dict[float, float]:
    """Perplexities of a method's finished tuning runs by learning rate."""
    tried = {rate: replace(job, learning_rate=rate) for rate in job.rates}
    return {rate: headline(runs[each.key]) for rate, each in tried.items() if finished(each, runs)}


def rates_to_try(found: dict[float, float], rates: tuple[float, ...], first: float) -> list[float]:
    """The learning rates to try next: from ``first`` the search climbs until both neighbours of the best are worse.
    Empty: the best of ``found`` is the tuned one."""
    if not found:
        return [first]
    place = rates.index(min(found, key=found.__getitem__))
    return [rate for rate in rates[max(place - 1, 0) : place + 2] if rate not in found]


def tuned_rate(job: Job, runs: dict) -> float | None:
    """The learning rate of a run; None while its tuning is not finished."""
    if job.learning_rate is not None:
        return job.learning_rate
    if not job.trains:
        return job.rates[0]
    for tuning in tuning_of(job):
        found = scores(tuning, runs)
        if found and not rates_to_try(found, job.rates, 0):
            return min(found, key=found.__getitem__)
    return None


def tuning_jobs(job: Job, runs: dict) -> list[Job]:
    """The tuning runs of ``job``, a tuning without a learning rate, that can start now."""
    at_first = replace(job, sparsity=TUNED_AT[0])
    first = tuned_rate(replace(at_first, tuning=False), runs) or job.rates[len(job.rates) // 2]
    return [replace(job, learning_rate=rate) for rate in rates_to_try(scores(job, runs), job.rates, first)]


def missing(wanted: Iterable[Job], runs: dict) -> list[str]:
    """Names of the runs of ``wanted`` that are not finished, each behind the tuning that it waits for."""
    names = []
    for job in wanted:
        if job.tuning and job.learning_rate is None:
            names += [job.key] if tuning_jobs(job, runs) else []
        elif not finished(job, runs):
            names += [tuning_of(job)[-1].key] if tuned_rate(job, runs) is None else []
            names.append(job.key)
    return list(dict.fromkeys(names))


def ready(wanted: Iterable[Job], runs: dict) -> Iterator[tuple[Job, float]]:
    """Jobs that can start now, with their learning rates: of ``wanted`` what is not finished, and the tuning that it
    waits for. A job may come more than once."""
    for job in wanted:
        if job.tuning and job.learning_rate is None:
            starting = tuning_jobs(job, runs)
        elif finished(job, runs):
            continue
        elif tuned_rate(job, runs) is None:
            starting = tuning_jobs(tuning_of(job)[-1], runs)
        else:
            starting = [job]
        for each in starting:
            rate = tuned_rate(each, runs)
            assert rate is not None
            yield each, rate
