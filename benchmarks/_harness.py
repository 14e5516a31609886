"""One run of the quality benchmark: its recipe, the run in a process of its own, and what it gives."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks._jobs import BEST, BEST_RECIPE, DENSE, Budget, Job, Settings
from losa.data.tokens import evaluation_tokens
from losa.errors import NumericsError
from losa.evaluation.perplexity import perplexity
from losa.model.loading import load_model
from losa.recipe.reading import data_source, override, parse_recipe, read_settings
from losa.recipe.sections import Recipe
from losa.record import RoundRecord
from losa.run.inputs import read_inputs
from losa.run.methods import MethodRun

REPORTED, TUNING, HELD_OUT = (
    "dev/wikitext2/wiki.valid.raw",
    "dev/wikitext2/wiki.test.even-articles.raw",
    "dev/c4/c4_val.dev.jsonl",
)
TRAINING = ("ft/dolly.train.jsonl", "ft/alpaca_gpt4.train.jsonl")
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


@dataclass(frozen=True)
class Setting:
    """What all runs of a file share. ``data``: a folder as docs/results.md describes it; ``limit``: examples of each
    zero-shot task, None for all."""

    model: str
    data: Path
    budget: Budget = Budget()
    limit: int | None = None


def recipe_of(job: Job, rate: float, setting: Setting) -> Recipe:
    """Raises RecipeError: an override or the best recipe names what there is not."""
    data, budget = setting.data, setting.budget
    settings: dict = {"method": "prune_only" if job.method == DENSE else job.method}
    if job.method == BEST:
        settings = best_settings(read_settings(BEST_RECIPE))
    settings |= {"model": setting.model, "output": "unused", "dtype": "float32", "seed": job.seed}
    pattern = isinstance(job.sparsity, str)
    defaults = {"rounds.count": 5, "allocation.mean_rank": 6, "lora.rank": 8, "train.warmup": 0.1}
    settings = override(settings, {key: value for key, value in defaults.items() if not _given(settings, key)})
    fixed: Settings = {
        "prune.pruner": job.pruner,
        "prune.sparsity": None if pattern else job.sparsity,
        "prune.pattern": job.sparsity if pattern else None,
        "calibration": {
            "data": str(data / "calib/c4_calib.jsonl"),
            "samples": budget.samples,
            "cka_samples": max(2, budget.samples // 2),
            "length": budget.length,
            "batch_size": 4,
        },
        "train.data": [str(data / file) for file in TRAINING],
        "train.length": budget.length,
        "train.batch_size": 1,
        "train.max_tokens": budget.tuning_tokens if job.tuning else budget.tokens,
        "train.learning_rate": rate,
        "train.train_on": "all",
        "train.precision": "bfloat16",
        "evaluate": {
            "data": str(data / (TUNING if job.tuning else REPORTED)),
            "length": budget.window,
            "max_windows": max(1, budget.windows // 3) if job.tuning else budget.windows,
            "each_round": False,
        },
    }
    return parse_recipe(override(settings, fixed | job.overrides), where=job.key)


def best_settings(recipe: dict) -> dict:
    """What a recipe says of a method, without data and budget."""
    chosen = {name: recipe[name] for name in SECTIONS if recipe.get(name) is not None}
    if "train" in chosen:
        chosen["train"] = {key: value for key, value in chosen["train"].items() if key not in BUDGETED}
    return chosen


def _given(settings: Mapping, dotted: str) -> bool:
    section, key = dotted.split(".")
    return key in settings.get(section, {})


class Measurements:
    """Measures every model that it is called with: perplexity on the recipe's text, and for a final run on held-out
    text and zero-shot tasks. A method that cannot be merged calls it with the unmerged model first."""

    def __init__(self, job: Job, setting: Setting, tokenizer, evaluate):
        self.job, self.setting, self.tokenizer, self.evaluate = job, setting, tokenizer, evaluate
        self.found: list[dict] = []
        self.seconds = 0.0

    def __call__(self, model: nn.Module) -> float:
        began = time.perf_counter()
        value = self.evaluate(model)
        self.found.append({"perplexity": value} | self._more(model))
        self.seconds += time.perf_counter() - began
        return value

    def _more(self, model: nn.Module) -> dict:
        more: dict = {}
        budget = self.setting.budget
        text = self.setting.data / HELD_OUT
        if not self.job.tuning and text.exists():
            tokens = evaluation_tokens(data_source(str(text), where="held-out text"), self.tokenizer)
            more["held_out"] = perplexity(model, tokens, budget.window, 1, max(1, budget.windows // 2)).value
        if self.job.tasks:
            from benchmarks._zero_shot import local_tasks

            more["tasks"] = local_tasks(model, self.tokenizer, self.setting.data / "dev/tasks", self.setting.limit)
        return more


def run_job(job: Job, rate: float, setting: Setting) -> dict:
    """The run's row in the file of results; ``seconds`` without those of measuring. Its numerics may fail: the row then
    says why.

    Raises:
        LosaError: settings that do not fit the model or the data, or text that cannot be read.
    """
    recipe = recipe_of(job, rate, setting)
    model, tokenizer = load_model(setting.model, dtype=recipe.dtype, device=recipe.device)
    torch.manual_seed(job.seed)
    inputs = read_inputs(recipe, model, tokenizer)
    measure = Measurements(job, setting, tokenizer, inputs.evaluate)
    inputs.evaluate = measure
    row: dict = {"learning_rate": rate} if job.trains else {}
    row |= {"overrides": job.overrides} if job.overrides else {}
    row |= {"task_limit": setting.limit} if job.tasks else {}
    try:
        if job.method == DENSE:
            row |= {"method": DENSE, "perplexity": measure(model)}
        else:
            with tempfile.TemporaryDirectory() as work:
                log = partial(_say, job.key)
                outcome = MethodRun(recipe.method, model, recipe, inputs, Path(work), log=log).run()
            row |= vars(outcome.result) | {"rounds": [_round(record) for record in outcome.rounds]}
            row["seconds"] -= measure.seconds
    except NumericsError as error:
        return row | {"failed": str(error)}
    row |= {key: value for key, value in measure.found[-1].items() if key != "perplexity"}
    for key, value in measure.found[0].items() if len(measure.found) > 1 else ():
        row[f"{key}_unmerged"] = value
    return row | {"threads": torch.get_num_threads(), "peak_bytes": _peak_bytes(model)}


def _say(key: str, line: str) -> None:
    print(f"{key}: {line}", flush=True)


def _round(record: RoundRecord) -> dict:
    return {
        "target_sparsity": record.target_sparsity,
        "sparsity": [round(s, 4) for s in record.sparsity],
        "ranks": record.ranks,
        "train_steps": record.train_steps,
        "train_loss": record.train_loss,
        "seconds": {stage: round(seconds, 1) for stage, seconds in record.seconds.items()},
    }


def _peak_bytes(model: nn.Module) -> int:
    """The most memory that this process has held: of the GPU that the model is on, or of the host."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
