"""The paper's tables: which runs make their rows, and the paper's figures, where they are known (LLaMA-2-7B)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks._jobs import BEST, BEST_RECIPE, DENSE, SEEDS, Budget, Job, Settings, finished, seeds_of
from losa.recipe.reading import read_settings

MASKED = "lora_masked"  # a row of its own of the run of "lora"
METHOD_NAMES = {
    DENSE: "dense",
    "prune_only": "pruned only",
    "lora": "LoRA (not mergeable)",
    MASKED: "LoRA, merged under the mask",
    "losa": "LoSA",
    BEST: "best recipe",
    "sparse_lora": "Sparse LoRA",
    "adalora": "AdaLoRA (not mergeable)",
    "sora": "SoRA (not mergeable)",
    "sparse_full": "all kept weights",
}
PRUNER_NAMES = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "alps": "ALPS",
    "pruner_zero": "Pruner-Zero",
    "wanda_sp": "Wanda-sp",
}
# Perplexity on WikiText-2: one-shot, LoRA, LoSA.
MAIN = {
    ("wanda", 0.5): (6.42, 6.33, 6.24),
    ("wanda", 0.6): (10.79, 8.07, 7.88),
    ("wanda", 0.7): (79.67, 12.57, 10.94),
    ("sparsegpt", 0.5): (6.51, 6.31, 6.27),
    ("sparsegpt", 0.6): (10.14, 7.98, 7.82),
    ("sparsegpt", 0.7): (27.42, 11.06, 10.82),
    ("alps", 0.7): (19.31, 10.83, 10.28),
    ("pruner_zero", 0.7): (103.15, 11.56, 10.78),
}
PATTERNS = {"2:4": (11.02, 8.27, 7.72), "2:8": (3006.0, 56.1, 25.4)}
UNIFORM_RATES: Settings = {"allocation.rates": "uniform"}
UNIFORM_RANKS: Settings = {"allocation.ranks": "uniform"}
# One round has the mean rank that five rounds have in their mean.
ONE_ROUND: Settings = {"rounds.schedule": "oneshot", "allocation.mean_rank": 8}
COLUMNS = ("perplexity", "held-out text", "tokens", "seconds", "CPU seconds")
RATES = ("uniform", "cka", "cka_normalised", "update", "owl", "dlp", "atp", "fisher")
# What a recipe may add to LoSA, and the settings without it.
INGREDIENTS: dict[str, Settings] = {
    "distillation": {"train.distill": None},
    "label loss": {"train.distill.weight": 1.0},
    "reconstruction": {"reconstruct": None},
    "trained norms": {"train.norms": None},
    "LoRA+ rates": {"train.lora_plus": 1},
    "regrowth": {"prune.regrow": False, "prune.regrow_by": "score"},
    "its layer rates": {
        "allocation.rates": "cka",
        "allocation.fill": None,
        "allocation.delta": None,
        "allocation.per": "block",
    },
    "its ranks": {
        "allocation.ranks": "error",
        "allocation.error": "relative",
        "allocation.mean_rank": 6,
        "allocation.rank_growth": 1,
        "allocation.rank_min": 1,
        "allocation.rank_max": 16,
        "lora.rank": 8,
    },
    "its rounds": {"rounds.count": 5, "rounds.schedule": "cubic"},
    "its scaling": {"lora.scaling": 2.0},
    "its optimisation": {
        "train.warmup": 0.1,
        "train.max_grad_norm": 0.3,
        "train.weight_decay": 1e-3,
        "train.lr_schedule": "per_round",
        "train.round_share": 0.1,
    },
    "rates of rows": {"allocation.per": "linear"},
    "rates of rows and linears": {"allocation.per": "block"},
    "all samples for rates": {"calibration.cka_samples": Budget().samples // 2},
}


@dataclass(frozen=True)
class Row:
    """``labels``: its cells on the left. ``paper``: the paper's perplexity, where it is known. ``merged``: the run is
    judged merged, not by its unmerged model."""

    labels: tuple[str, ...]
    job: Job
    paper: float | None = None
    merged: bool = False

    def jobs(self, seeds: int = SEEDS) -> list[Job]:
        """The run for each seed, of the first ``seeds`` at most."""
        return [replace(self.job, seed=seed) for seed in range(min(seeds, seeds_of(self.job)))]

    def found(self, runs: dict, seeds: Iterable[int]) -> list[dict]:
        """Its finished runs, of whichever ``seeds``."""
        return list(self.by_seed(runs, seeds).values())

    def by_seed(self, runs: dict, seeds: Iterable[int]) -> dict[int, dict]:
        """The same by their seeds."""
        jobs = [replace(self.job, seed=seed) for seed in ([0] if self.job.method == DENSE else seeds)]
        return {job.seed: runs[job.key] for job in jobs if finished(job, runs)}


@dataclass(frozen=True)
class Table:
    """``kind``: of "runs" the columns are names of ``benchmarks.paper.COLUMNS``; "blocks", "tasks" and "tuning" have
    their own. ``compared``: which pairs of rows tell whether the paper's order holds: those that differ in one label,
    or all."""

    title: str
    header: tuple[str, ...]
    rows: list[Row]
    columns: tuple[str, ...] = COLUMNS
    kind: Literal["runs", "blocks", "tasks", "tuning"] = "runs"
    compared: Literal["in one label", "all"] = "in one label"


def variant(name: str, settings: Settings, method: str = "losa", **job) -> Job:
    return Job(method, variant=name if settings else "", overrides=settings, **job)


def ablation_of(name: str, settings: Settings, method: str = "losa", **job) -> Job:
    """A run of an ablation: it has few tokens, where it trains."""
    made = variant(name, settings, method, **job)
    return replace(made, short=made.trains)


def compared(labels: tuple[str, ...], job: Job, paper: float | None = None) -> Iterator[Row]:
    """The rows of a run of the comparison: LoRA has one more, merged under the mask."""
    yield Row((*labels, METHOD_NAMES[job.method]), job, paper)
    if job.method == "lora":
        yield Row((*labels, METHOD_NAMES[MASKED]), job, None, merged=True)


def main_rows() -> Iterator[Row]:
    for (pruner, sparsity), papers in MAIN.items():
        for method, paper in zip(("prune_only", "lora", "losa", BEST), (*papers, None), strict=True):
            if method != BEST or pruner == "wanda" or sparsity == 0.7:
                yield from compared((PRUNER_NAMES[pruner], f"{sparsity:.0%}"), Job(method, pruner, sparsity), paper)
        if pruner == "wanda":
            yield from compared((PRUNER_NAMES[pruner], f"{sparsity:.0%}"), Job("sparse_full", pruner, sparsity))


def baselines() -> Iterator[Row]:
    papers = {"lora": 12.57, "sparse_lora": 12.74, "adalora": 12.08, "sora": 11.89, "losa": 10.94}
    for method in ("lora", "sparse_lora", "adalora", "sora", "sparse_full", "losa", BEST):
        yield from compared((), Job(method), papers.get(method))


def efficiency() -> Iterator[Row]:
    for row in baselines():
        yield replace(row, paper=None)


def patterns(pattern: str) -> Iterator[Row]:
    papers = PATTERNS[pattern]
    mixed: Settings = {"prune.mixed": True}
    yield Row((pattern, "pruned only"), Job("prune_only", sparsity=pattern), papers[0])
    yield Row((pattern, METHOD_NAMES["lora"]), ablation_of("", {}, "lora", sparsity=pattern), papers[1])
    yield Row((pattern, "LoSA, in every block"), ablation_of("", {}, sparsity=pattern))
    yield Row((pattern, "LoSA, mixed"), ablation_of("mixed", mixed, sparsity=pattern), papers[2])


def sparsities() -> Iterator[Row]:
    for sparsity in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        papers = MAIN.get(("wanda", sparsity), (None,) * 3)
        for method, paper in zip(("prune_only", "lora", "losa", BEST), (*papers, None), strict=True):
            if method != BEST or sparsity in (0.5, 0.6, 0.7):
                yield Row(
                    (f"{sparsity:.0%}", METHOD_NAMES[method]), ablation_of("", {}, method, sparsity=sparsity), paper
                )


def ablation() -> Iterator[Row]:
    papers = {
        (True, True, True): 10.94,
        (False, True, True): 11.36,
        (True, False, True): 11.44,
        (True, True, False): 11.78,
    }
    for rates, ranks, rounds in (
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (True, True, False),
        (True, False, True),
        (False, True, True),
        (True, True, True),
    ):
        settings = {} if rates else dict(UNIFORM_RATES)
        settings |= ({} if ranks else UNIFORM_RANKS) | ({} if rounds else ONE_ROUND)
        parts = {"no_rates": rates, "no_ranks": ranks, "no_rounds": rounds}
        name = "-".join(part for part, kept in parts.items() if not kept)
        some = rates or ranks or rounds
        # Without all three it is Sparse LoRA.
        job = ablation_of(name, settings) if some else ablation_of("", {}, "sparse_lora")
        paper = papers.get((rates, ranks, rounds)) if some else 12.74
        yield Row(tuple("yes" if kept else "" for kept in (rates, ranks, rounds)), job, paper)


def ranks() -> Iterator[Row]:
    for by, name, paper in (("error", "", 10.94), ("sparsity", "ranks_sparsity", None), ("uniform", "no_ranks", 11.44)):
        settings: Settings = {} if by == "error" else {"allocation.ranks": by}
        yield Row((by,), ablation_of(name, settings), paper)


def rounds() -> Iterator[Row]:
    for count in (1, 3, 5, 7):
        settings: Settings = {} if count == 5 else ONE_ROUND if count == 1 else {"rounds.count": count}
        name = "no_rounds" if count == 1 else f"rounds{count}"
        yield Row(("T", str(count)), ablation_of(name, settings), {1: 11.78, 5: 10.94}.get(count))
    for rank in (4, 6, 8):
        settings = {} if rank == 6 else {"allocation.mean_rank": rank}
        paper = 10.94 if rank == 6 else None
        yield Row(("mean rank of the first round", str(rank)), ablation_of(f"rank{rank}", settings), paper)


def schedules() -> Iterator[Row]:
    yield Row(("cubic (Eq. 8)",), ablation_of("", {}), 10.94)
    yield Row(("linear (Eq. 10)",), ablation_of("linear", {"rounds.schedule": "linear"}))
    yield Row(("one round",), ablation_of("no_rounds", ONE_ROUND), 11.78)


def layer_rates() -> Iterator[Row]:
    for rates in RATES:
        paper = {"cka": 10.94, "uniform": 11.36}.get(rates)
        settings: Settings = {} if rates == "cka" else {"allocation.rates": rates}
        yield Row((rates,), ablation_of("no_rates" if rates == "uniform" else f"rates_{rates}", settings), paper)
    for rates in ("cka", "fisher"):
        settings = {"allocation.per": "linear"} | ({} if rates == "cka" else {"allocation.rates": rates})
        name = "per_linear" if rates == "cka" else f"rates_{rates}_per_linear"
        yield Row((f"{rates}, rates and ranks per linear",), ablation_of(name, settings))
    settings = {"allocation.per": "row", "allocation.rates": "fisher"}
    yield Row(("fisher, rates per row",), ablation_of("rates_fisher_per_row", settings))


def one_shot_rates() -> Iterator[Row]:
    """The papers' own figures: of Wanda, OWL and DLP as DLP has them, of ATP."""
    papers = {"uniform": 76.8, "owl": 30.6, "dlp": 22.8, "atp": 24.0}
    for rates in RATES:
        settings: Settings = {"allocation.rates": rates, "allocation.apply_to": "all"}
        uniform = rates == "uniform"
        job = variant("" if uniform else f"rates_{rates}", {} if uniform else settings, "prune_only")
        yield Row((rates,), job, papers.get(rates))
    for per in ("linear", "row"):
        settings = {"allocation.rates": "fisher", "allocation.apply_to": "all", "allocation.per": per}
        yield Row((f"fisher, rates per {per}",), variant(f"rates_fisher_per_{per}", settings, "prune_only"))


def structured() -> Iterator[Row]:
    for method in ("prune_only", "losa"):
        settings = UNIFORM_RATES if method == "losa" else {}
        yield Row(
            ("20%", METHOD_NAMES[method]), ablation_of("no_rates", settings, method, pruner="wanda_sp", sparsity=0.2)
        )


def ingredients() -> Iterator[Row]:
    yield Row(("best recipe",), Job(BEST))
    best = read_settings(BEST_RECIPE)
    for name, settings in INGREDIENTS.items():
        if not any(_value(best, key) not in (None, value) for key, value in settings.items()):
            continue  # the best recipe has no such part
        yield Row((f"without {name}",), variant("no_" + name.replace(" ", "_"), settings, BEST))
    yield Row(("LoSA",), Job("losa"))


def _value(settings: dict, dotted: str) -> object:
    *sections, key = dotted.split(".")
    for section in sections:
        settings = settings.get(section) or {}
    return settings.get(key)


def zero_shot() -> Iterator[Row]:
    for method in (DENSE, "prune_only", "lora", "losa", BEST):
        yield Row((METHOD_NAMES[method],), Job(method, sparsity=0.5))


def tables() -> dict[str, Table]:
    """Every table by its name: the paper's number where it has one there."""
    at_70, by_method = "Wanda, 70 %", ("method",)
    cost = ("perplexity", "trained", *COLUMNS[2:], "memory")
    parts = ("rates (LSR)", "ranks (SRA)", "rounds (DSA)")
    return {
        "main": Table("Pruners, sparsities and methods", ("pruner", "sparsity", "method"), [*main_rows()]),
        "baselines": Table(f"Methods, {at_70}", by_method, [*baselines()]),
        "2": Table(f"Cost of fine-tuning, {at_70}", by_method, [*efficiency()], cost),
        "3": Table("2:8", ("pattern", "method"), [*patterns("2:8")]),
        "4": Table("Wanda, by sparsity", ("sparsity", "method"), [*sparsities()]),
        "6": Table(f"Parts of LoSA, {at_70}", parts, [*ablation()], compared="all"),
        "7": Table(f"Ranks, {at_70}", ("ranks by",), [*ranks()]),
        "19": Table("2:4", ("pattern", "method"), [*patterns("2:4")]),
        "schedules": Table(f"Schedules, {at_70}", ("schedule",), [*schedules()]),
        "rates": Table(f"Layer rates, {at_70}", ("rates",), [*layer_rates()]),
        "one-shot": Table(f"Layer rates, pruned at once, {at_70}", ("rates",), [*one_shot_rates()]),
        "structured": Table("Whole heads and channels, Wanda-sp", ("sparsity", "method"), [*structured()]),
        "ingredients": Table("The best recipe without each of its parts", ("recipe",), [*ingredients()]),
        "figure2": Table(f"Rounds and ranks, {at_70}", ("setting", "value"), [*rounds()]),
        "figure3": Table(
            f"Rates of the blocks in the last round, {at_70}", ("rates",), [*layer_rates()], kind="blocks"
        ),
        "zero-shot": Table("Zero-shot accuracy, Wanda, 50 %", by_method, [*zero_shot()], kind="tasks"),
        "tuning": Table("Tuning of learning rates, on another text", (), [], kind="tuning"),
    }
