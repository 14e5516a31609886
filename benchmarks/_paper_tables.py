"""The paper's tables: which runs make their rows, and the paper's figures, where they are known (LLaMA-2-7B)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks._jobs import BEST, BEST_RECIPE, DENSE, Job, Settings
from losa.recipe.reading import read_settings

METHOD_NAMES = {
    DENSE: "dense",
    "prune_only": "pruned only",
    "lora": "LoRA (not mergeable)",
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
RATES = ("uniform", "cka", "cka_normalised", "update", "owl", "dlp", "atp")
# What a recipe may add to LoSA, and the settings without it.
INGREDIENTS: dict[str, Settings] = {
    "distillation": {"train.distill": None},
    "reconstruction": {"reconstruct": None},
    "trained norms": {"train.norms": None},
    "LoRA+ rates": {"train.lora_plus": 1},
    "regrowth": {"prune.regrow": False},
    "its layer rates": {"allocation.rates": "cka", "allocation.fill": None, "allocation.delta": None},
    "rates per linear": {"allocation.per": "block"},
}


@dataclass(frozen=True)
class Row:
    """``labels``: its cells on the left. ``paper``: the paper's perplexity, where it is known."""

    labels: tuple[str, ...]
    job: Job
    paper: float | None = None

    def jobs(self, seeds: int) -> list[Job]:
        """The run for each seed: only Wanda at 70 % has several."""
        several = (
            self.job.method != DENSE and not self.job.tasks and (self.job.pruner, self.job.sparsity) == ("wanda", 0.7)
        )
        return [replace(self.job, seed=seed) for seed in range(seeds if several else 1)]


@dataclass(frozen=True)
class Table:
    """``columns``: names of ``benchmarks.paper.COLUMNS``, or of its kind "blocks" or "tasks" alone."""

    title: str
    header: tuple[str, ...]
    rows: list[Row]
    columns: tuple[str, ...] = ("perplexity", "held-out text", "tokens", "seconds")


def variant(name: str, settings: Settings, method: str = "losa", **job) -> Job:
    return Job(method, variant=name if settings else "", overrides=settings, **job)


def main_rows() -> Iterator[Row]:
    for (pruner, sparsity), papers in MAIN.items():
        for method, paper in zip(("prune_only", "lora", "losa", BEST), (*papers, None), strict=True):
            labels = (PRUNER_NAMES[pruner], f"{sparsity:.0%}", METHOD_NAMES[method])
            yield Row(labels, Job(method, pruner, sparsity), paper)


def baselines() -> Iterator[Row]:
    papers = {"lora": 12.57, "sparse_lora": 12.74, "adalora": 12.08, "sora": 11.89, "losa": 10.94}
    for method in ("lora", "sparse_lora", "adalora", "sora", "sparse_full", "losa", BEST):
        yield Row((METHOD_NAMES[method],), Job(method), papers.get(method))


def efficiency() -> Iterator[Row]:
    for row in baselines():
        yield replace(row, paper=None)


def patterns(pattern: str) -> Iterator[Row]:
    papers = PATTERNS[pattern]
    mixed: Settings = {"prune.mixed": True}
    yield Row((pattern, "pruned only"), Job("prune_only", sparsity=pattern), papers[0])
    yield Row((pattern, METHOD_NAMES["lora"]), Job("lora", sparsity=pattern), papers[1])
    yield Row((f"{pattern} in every block", "LoSA"), Job("losa", sparsity=pattern))
    yield Row((f"{pattern} mixed", "LoSA"), variant("mixed", mixed, sparsity=pattern), papers[2])
    yield Row((f"{pattern} mixed", "best recipe"), variant("mixed", mixed, BEST, sparsity=pattern))


def sparsities() -> Iterator[Row]:
    for sparsity in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        papers = MAIN.get(("wanda", sparsity), (None,) * 3)
        for method, paper in zip(("prune_only", "lora", "losa", BEST), (*papers, None), strict=True):
            yield Row((f"{sparsity:.0%}", METHOD_NAMES[method]), Job(method, sparsity=sparsity), paper)


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
        # Without all three it is Sparse LoRA.
        job = variant(name, settings) if rates or ranks or rounds else Job("sparse_lora")
        paper = papers.get((rates, ranks, rounds)) if rates or ranks or rounds else 12.74
        yield Row(tuple("yes" if kept else "" for kept in (rates, ranks, rounds)), job, paper)


def ranks() -> Iterator[Row]:
    for by, name, paper in (("error", "", 10.94), ("sparsity", "ranks_sparsity", None), ("uniform", "no_ranks", 11.44)):
        settings: Settings = {} if by == "error" else {"allocation.ranks": by}
        yield Row((by,), variant(name, settings), paper)


def rounds() -> Iterator[Row]:
    for count in (1, 2, 3, 5, 7, 10):
        settings: Settings = {} if count == 5 else ONE_ROUND if count == 1 else {"rounds.count": count}
        name = "no_rounds" if count == 1 else f"rounds{count}"
        yield Row(("T", str(count)), variant(name, settings), 10.94 if count == 5 else None)
    for rank in (2, 4, 6, 8, 10):
        settings = {} if rank == 6 else {"allocation.mean_rank": rank}
        yield Row(
            ("mean rank of the first round", str(rank)), variant(f"rank{rank}", settings), 10.94 if rank == 6 else None
        )


def schedules() -> Iterator[Row]:
    yield Row(("cubic (Eq. 8)",), Job("losa"), 10.94)
    yield Row(("linear (Eq. 10)",), variant("linear", {"rounds.schedule": "linear"}))
    yield Row(("one round",), variant("no_rounds", ONE_ROUND), 11.78)


def layer_rates() -> Iterator[Row]:
    for rates in RATES:
        paper = {"cka": 10.94, "uniform": 11.36}.get(rates)
        settings: Settings = {} if rates == "cka" else {"allocation.rates": rates}
        yield Row((rates,), variant("no_rates" if rates == "uniform" else f"rates_{rates}", settings), paper)
    yield Row(("cka, rates and ranks per linear",), variant("per_linear", {"allocation.per": "linear"}))


def structured() -> Iterator[Row]:
    for sparsity in (0.1, 0.2, 0.3):
        for method in ("prune_only", "lora", "losa"):
            settings = UNIFORM_RATES if method == "losa" else {}
            job = variant("no_rates", settings, method, pruner="wanda_sp", sparsity=sparsity)
            yield Row((f"{sparsity:.0%}", METHOD_NAMES[method]), job)


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
        yield Row((METHOD_NAMES[method],), Job(method, sparsity=0.5, tasks=True))


def table_of(title: str, header: tuple[str, ...], rows: Callable[[], Iterator[Row]], *columns: str) -> Table:
    return Table(title, header, list(rows()), *((columns,) if columns else ()))


def tables() -> dict[str, Table]:
    """Every table by its name: the paper's number where it has one there."""
    at_70, by_method = "Wanda, 70 %", ("method",)
    return {
        "main": table_of("Pruners, sparsities and methods", ("pruner", "sparsity", "method"), main_rows),
        "baselines": table_of(f"Methods, {at_70}", by_method, baselines),
        "2": table_of(
            f"Cost of fine-tuning, {at_70}",
            by_method,
            efficiency,
            "perplexity",
            "trained",
            "tokens",
            "seconds",
            "memory",
        ),
        "3": table_of("2:8", ("pattern", "method"), lambda: patterns("2:8")),
        "4": table_of("Wanda, by sparsity", ("sparsity", "method"), sparsities),
        "6": table_of(f"Parts of LoSA, {at_70}", ("rates", "ranks", "rounds"), ablation),
        "7": table_of(f"Ranks, {at_70}", ("ranks by",), ranks),
        "19": table_of("2:4", ("pattern", "method"), lambda: patterns("2:4")),
        "schedules": table_of(f"Schedules, {at_70}", ("schedule",), schedules),
        "rates": table_of(f"Layer rates, {at_70}", ("rates",), layer_rates),
        "structured": table_of("Whole heads and channels, Wanda-sp", ("sparsity", "method"), structured),
        "ingredients": table_of(f"The best recipe without each of its parts, {at_70}", ("recipe",), ingredients),
        "figure2": table_of(f"Rounds and ranks, {at_70}", ("setting", "value"), rounds),
        "figure3": table_of(f"Rates of the blocks in the last round, {at_70}", ("rates",), layer_rates, "blocks"),
        "zero-shot": table_of("Zero-shot accuracy, Wanda, 50 %", by_method, zero_shot, "tasks"),
    }
