"""Does LoSA beat its baselines at equal training tokens? Perplexity of merged models over methods, seeds, pruners.

Every finished run is written to --out at once, and runs found there are not repeated, so that a comparison of many
hours can be stopped and resumed. Learning rates are tuned once per method, with a third of the tokens, on other text
than the text that is reported.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import _models
from benchmarks._machine import machine, origin
from benchmarks._results import plain_parser, read_document
from losa.data.tokens import calibration_tokens, evaluation_tokens, training_sequences
from losa.evaluation.perplexity import perplexity
from losa.model.blocks import block_linears
from losa.model.loading import load_model
from losa.recipe.reading import parse_recipe
from losa.recipe.sections import Recipe
from losa.run.inputs import Inputs
from losa.run.methods import MethodRun
from losa.storage.files import write_json

GRID = dict.fromkeys(("lora", "sparse_lora", "losa"), (1e-3, 2e-3, 4e-3, 8e-3))
TOKENS = 61_440
TUNING_TOKENS = 20_480
SWITCHES = {
    "no_rates": {"allocation.rates": "uniform"},
    "no_ranks": {"allocation.ranks": "uniform"},
    "no_rounds": {"rounds.schedule": "oneshot"},
}


@dataclass(frozen=True)
class Job:
    """One run. ``learning_rate`` None: the method's tuned one."""

    method: str
    pruner: str = "wanda"
    sparsity: float = 0.7
    seed: int = 0
    learning_rate: float | None = None
    tuning: bool = False
    switch: str | None = None

    @property
    def key(self) -> str:
        parts = [self.method, self.pruner, f"{self.sparsity:.2f}", f"seed{self.seed}"]
        if self.switch:
            parts.append(self.switch)
        if self.tuning:
            parts.append(f"tune-lr{self.learning_rate:g}")
        return "/".join(parts)


def tuning_jobs() -> list[Job]:
    return [Job(m, learning_rate=lr, tuning=True) for m, grid in GRID.items() for lr in grid]


def final_jobs() -> list[Job]:
    jobs = [Job(m, seed=s) for s in range(3) for m in ("prune_only", "losa", "lora", "sparse_lora")]
    jobs += [Job(m, sparsity=s) for s in (0.5, 0.6) for m in ("prune_only", "losa", "lora")]
    jobs += [Job(m, pruner="sparsegpt") for m in ("prune_only", "losa", "lora")]
    return jobs


def ablation_jobs() -> list[Job]:
    return [Job("losa", switch=name) for name in SWITCHES]


class Harness:
    """Loads the model once; every job starts from the same dense weights."""

    def __init__(self, model: str, data: Path, windows: int):
        self.data = data
        self.model_name = _models.source(model)
        self.windows = windows
        self.model, self.tokenizer = load_model(self.model_name, dtype="float32", device="auto")
        self.linears = block_linears(self.model)

    def recipe(self, job: Job, learning_rate: float) -> Recipe:
        settings = {
            "model": self.model_name,
            "output": "unused",
            "method": job.method,
            "seed": job.seed,
            "prune": {"pruner": job.pruner, "sparsity": job.sparsity},
            "rounds": {"count": 5},
            "allocation": {"mean_rank": 6},
            "lora": {"rank": 8},
            "calibration": {
                "data": str(self.data / "calib/c4_calib.jsonl"),
                "samples": 16,
                "cka_samples": 8,
                "length": 256,
                "batch_size": 4,
            },
            "train": {
                "data": [str(self.data / "ft/dolly.train.jsonl"), str(self.data / "ft/alpaca_gpt4.train.jsonl")],
                "length": 256,
                "batch_size": 4,
                "max_tokens": TUNING_TOKENS if job.tuning else TOKENS,
                "learning_rate": learning_rate,
                "train_on": "all",
                "precision": "bfloat16",
            },
            "evaluate": {
                "data": str(
                    self.data
                    / ("dev/wikitext2/wiki.test.even-articles.raw" if job.tuning else "dev/wikitext2/wiki.valid.raw")
                ),
                "length": 512,
                "max_windows": self.windows // 3 if job.tuning else self.windows,
                "each_round": False,
            },
        }
        if job.switch:
            for dotted, value in SWITCHES[job.switch].items():
                section, key = dotted.split(".")
                settings[section] = {**settings[section], key: value}
        return parse_recipe(settings, where=job.key)

    def dense(self) -> dict:
        recipe = self.recipe(Job("prune_only"), 1e-3)
        return asdict(perplexity(self.model, self._evaluation(recipe), 512, 1, self.windows))

    def _evaluation(self, recipe: Recipe):
        return evaluation_tokens(recipe.evaluate.data, self.tokenizer)

    def run(self, job: Job, learning_rate: float, work: Path) -> dict:
        recipe = self.recipe(job, learning_rate)
        for name, linear in self.linears.items():
            self.model.set_submodule(name, linear)
        torch.manual_seed(job.seed)
        c, t, e = recipe.calibration, recipe.train, recipe.evaluate
        tokens = self._evaluation(recipe)
        inputs = Inputs(
            calibration_tokens(c.data, self.tokenizer, c.samples, c.length, job.seed),
            training_sequences(t.data, self.tokenizer, t.length, job.seed, t.train_on, t.max_tokens),
            lambda model: perplexity(model, tokens, e.length, e.batch_size, e.max_windows).value,
        )
        start = time.perf_counter()
        outcome = MethodRun(job.method, self.model, recipe, inputs, work).run()
        result = vars(outcome.result) | {"learning_rate": learning_rate, "seconds": time.perf_counter() - start}
        result["rounds"] = [
            {
                "target_sparsity": r.target_sparsity,
                "sparsity": [round(s, 4) for s in r.sparsity],
                "ranks": r.ranks,
                "train_steps": r.train_steps,
                "train_loss": r.train_loss,
                "seconds": {k: round(v, 1) for k, v in r.seconds.items()},
            }
            for r in outcome.rounds
        ]
        return result


def headline(result: dict) -> float:
    """The perplexity by which a method is judged: of the merged model, except for LoRA, which is only good unmerged."""
    return result["perplexity_unmerged"] if result["perplexity_unmerged"] is not None else result["perplexity"]


def tuned_rate(runs: dict, method: str) -> float:
    if method not in GRID:
        return GRID["losa"][0]
    scored = {lr: headline(runs[Job(method, learning_rate=lr, tuning=True).key]) for lr in GRID[method]}
    return min(scored, key=scored.get)


def table(runs: dict) -> str:
    """Markdown: mean over seeds (and the spread where there are several)."""
    groups: dict[tuple, list[float]] = {}
    for job in (*final_jobs(), *ablation_jobs()):
        if job.key in runs:
            name = job.method if job.switch is None else f"losa {job.switch.replace('_', ' ')}"
            groups.setdefault((job.pruner, job.sparsity, name), []).append(headline(runs[job.key]))
    lines = ["| pruner | sparsity | method | perplexity | seeds |", "|---|---|---|---|---|"]
    for (pruner, sparsity, name), values in sorted(groups.items(), key=lambda i: (i[0][:2], statistics.mean(i[1]))):
        spread = f" ({min(values):.1f}..{max(values):.1f})" if len(values) > 1 else ""
        lines.append(f"| {pruner} | {sparsity:.0%} | {name} | {statistics.mean(values):.1f}{spread} | {len(values)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = plain_parser("quality", __doc__)
    _models.add_model_option(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder with calib/, ft/ and dev/ (docs/results.md)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; finished runs in it are kept")
    parser.add_argument("--windows", type=int, default=48, help="evaluation windows of 512 tokens")
    parser.add_argument("--only", action="append", help="run only jobs whose key contains this text; may be repeated")
    parser.add_argument("--ablations", action="store_true", help="also losa without rates, ranks, rounds")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs and stop")
    args = parser.parse_args(argv)

    state = read_document("quality", args.out) if args.out.exists() else {"runs": {}}
    runs = state["runs"]
    if args.table:
        print(table(runs))
        return 0
    harness = Harness(args.model, args.data, args.windows)
    state["setup"] = {
        "model": harness.model_name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "training_tokens": TOKENS,
        "tuning_tokens": TUNING_TOKENS,
        "evaluation": f"WikiText-2 raw validation, length 512, first {args.windows} windows",
        "training": "dolly + alpaca_gpt4, loss on all tokens, 4 x 256 a step, bfloat16 autocast where the CPU has it",
        "calibration": "C4, 16 x 256 tokens",
        "grid": GRID,
    }
    state["machine"] = machine(str(harness.model.device))
    state["origin"] = origin(state.get("origin", {}) if runs else None)
    if "dense" not in state:
        state["dense"] = harness.dense()
        write_json(args.out, state)
    jobs = tuning_jobs() + final_jobs() + (ablation_jobs() if args.ablations else [])
    for job in jobs:
        if job.key in runs or (args.only and not any(text in job.key for text in args.only)):
            continue
        rate = job.learning_rate or tuned_rate(runs, job.method)
        print(f"== {job.key} at learning rate {rate:g}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            runs[job.key] = harness.run(job, rate, Path(work))
        write_json(args.out, state)
        print(f"   {headline(runs[job.key]):.2f} in {runs[job.key]['seconds']:.0f} s", flush=True)
    print(table(runs))
    return 0
