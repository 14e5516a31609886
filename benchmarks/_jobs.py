"""The runs of the quality benchmark and of the paper's tables: what each one is, and how its learning rate is found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from losa.recipe.methods import find_method

# Full fine-tuning takes about a tenth of an adapter's learning rate.
ADAPTER_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
FULL_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
TUNED_AT = (0.7, 0.6, 0.5)
DENSE, BEST = "dense", "best"
BEST_RECIPE = Path(__file__).parents[1] / "examples/smollm2-best.yaml"

Settings = dict[str, object]
"""Recipe settings by dotted name."""


@dataclass(frozen=True)
class Budget:
    """What every run gets alike: tokens of training (of a tuning run a third), of a sequence, of a window; samples."""

    tokens: int = 61_440
    tuning_tokens: int = 20_480
    length: int = 256
    samples: int = 16
    windows: int = 48
    window: int = 512


@dataclass(frozen=True)
class Job:
    """One run.

    ``method``: a recipe's method, ``best`` (the settings of examples/smollm2-best.yaml) or ``dense`` (no run: the model
    as it is). ``sparsity``: a share, or a pattern such as "2:4". ``variant`` names ``overrides``. ``learning_rate``:
    None is the tuned one. ``tuning``: a third of the tokens, judged on other text. ``tasks``: also zero-shot tasks.
    """

    method: str
    pruner: str = "wanda"
    sparsity: float | str = 0.7
    seed: int = 0
    variant: str = ""
    overrides: Settings = field(default_factory=dict)
    learning_rate: float | None = None
    tuning: bool = False
    tasks: bool = False

    @property
    def key(self) -> str:
        """The run's name in the file of results."""
        if self.method == DENSE:
            parts = [DENSE]
        else:
            parts = [self.method, self.pruner, sparsity_name(self.sparsity), f"seed{self.seed}"]
        parts += [self.variant] if self.variant else []
        parts += ["tasks"] if self.tasks else []
        if self.learning_rate is not None:
            parts.append(f"{'tune-' if self.tuning else ''}lr{self.learning_rate:g}")
        return "/".join(parts)

    @property
    def trains(self) -> bool:
        method = find_method(self.method)
        return self.method != DENSE and (method is None or method.trains)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates among which the method's is tuned."""
        return FULL_RATES if self.method == "sparse_full" else ADAPTER_RATES


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
    own = replace(job, seed=0, learning_rate=None, tuning=True, tasks=False)
    variant = replace(own, pruner="wanda", sparsity=min(TUNED_AT, key=lambda tuned: abs(tuned - share)))
    return [own, variant, replace(variant, variant="", overrides={})]


def scores(job: Job, runs: dict) -> dict[float, float]:
    """Perplexities of a method's finished tuning runs by learning rate."""
    keys = {rate: replace(job, learning_rate=rate).key for rate in job.rates}
    return {rate: headline(runs[key]) for rate, key in keys.items() if key in runs}


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


def ready(wanted: Iterable[Job], runs: dict) -> Iterator[tuple[Job, float]]:
    """Jobs that can start now, with their learning rates: of ``wanted`` what is not in ``runs``, and the tuning that it
    waits for. A job may come more than once."""
    for job in wanted:
        if job.tuning and job.learning_rate is None:
            starting = tuning_jobs(job, runs)
        elif job.key in runs:
            continue
        elif tuned_rate(job, runs) is None:
            starting = tuning_jobs(tuning_of(job)[-1], runs)
        else:
            starting = [job]
        for each in starting:
            rate = tuned_rate(each, runs)
            assert rate is not None
            yield each, rate
