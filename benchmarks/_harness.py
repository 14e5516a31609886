"""One run of the quality benchmark: its recipe, the run in a process of its own, and what it gives."""

from __future__ import annotations

import re
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks._jobs import DENSE, Budget, Job, Settings, base_settings, digest
from benchmarks._machine import commit
from losa.data.tokens import evaluation_tokens
from losa.errors import NumericsError
from losa.evaluation.perplexity import perplexity
from losa.model.loading import load_model
from losa.recipe.reading import data_source, override, parse_recipe
from losa.recipe.sections import Recipe
from losa.record import RoundRecord
from losa.run.inputs import read_inputs
from losa.run.methods import MethodRun

REPORTED, TUNING, HELD_OUT = (
    "dev/wikitext2/wiki.valid.raw",
    "dev/wikitext2/wiki.test.even-articles.raw",
    "dev/c4/c4_val.dev.jsonl",
)
TASKS = "dev/tasks"
TRAINING = ("ft/dolly.train.jsonl", "ft/alpaca_gpt4.train.jsonl")


@dataclass(frozen=True)
class Setting:
    """What all runs of a file share. ``data``: a folder as docs/results.md describes it."""

    model: str
    data: Path
    budget: Budget = Budget()


def recipe_of(job: Job, rate: float, setting: Setting) -> Recipe:
    """Raises RecipeError: an override or the best recipe names what there is not."""
    data, budget = setting.data, setting.budget
    base = base_settings(job) | {"model": setting.model, "output": "unused", "dtype": "float32", "seed": job.seed}
    compared = base.get("calibration", {}).get("cka_samples", max(2, budget.samples // 2))
    fixed: Settings = {
        "calibration": {
            "data": str(data / "calib/c4_calib.jsonl"),
            "samples": budget.samples,
            "cka_samples": min(compared, budget.samples),
            "length": budget.length,
            "batch_size": 4,
        },
        "train.data": [str(data / file) for file in TRAINING],
        "train.length": budget.length,
        "train.batch_size": 1,
        "train.max_tokens": budget.short_tokens if job.tuning or job.short else budget.tokens,
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
    return parse_recipe(override(base, fixed | job.overrides), where=job.key)


class Measurements:
    """Measures every model that it is called with: perplexity on the recipe's text. The first model is the one by which
    the run is judged, unmerged where the method cannot be merged: ``more`` has its perplexity on held-out text and its
    zero-shot tasks, and the held-out perplexity of the merged model that follows."""

    def __init__(self, job: Job, setting: Setting, tokenizer, evaluate):
        self.job, self.setting, self.tokenizer, self.evaluate = job, setting, tokenizer, evaluate
        self.more: dict | None = None
        self.seconds = self.cpu_seconds = 0.0

    def __call__(self, model: nn.Module) -> float:
        began, cpu_began = time.perf_counter(), time.process_time()
        value = self.evaluate(model)
        held_out = self._held_out(model)
        if self.more is None:
            self.more = held_out | self._tasks(model)
        else:
            self.more |= {f"{name}_merged": found for name, found in held_out.items()}
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began
        return value

    def _held_out(self, model: nn.Module) -> dict:
        budget, text = self.setting.budget, self.setting.data / HELD_OUT
        if self.job.tuning or not text.exists():
            return {}
        tokens = evaluation_tokens(data_source(str(text), where="held-out text"), self.tokenizer)
        return {"held_out": perplexity(model, tokens, budget.window, 1, max(1, budget.windows // 2)).value}

    def _tasks(self, model: nn.Module) -> dict:
        limit = self.job.task_limit
        if limit == 0:
            return {}
        from benchmarks._zero_shot import local_tasks

        return {"task_limit": limit, "tasks": local_tasks(model, self.tokenizer, self.setting.data / TASKS, limit)}


def run_job(job: Job, rate: float, setting: Setting) -> dict:
    """The run's row in the file of results; ``seconds`` and ``cpu_seconds`` do not count those of measuring. Its
    numerics may fail: the row then says why.

    Raises:
        LosaError: settings that do not fit the model or the data, or text that cannot be read.
    """
    row: dict = {"settings": digest(job)}
    recipe = recipe_of(job, rate, setting)
    model, tokenizer = load_model(setting.model, dtype=recipe.dtype, device=recipe.device)
    torch.manual_seed(job.seed)
    inputs = read_inputs(recipe, model, tokenizer)
    measure = Measurements(job, setting, tokenizer, inputs.evaluate)
    inputs.evaluate = measure
    row |= {"learning_rate": rate} if job.trains else {}
    row |= {"overrides": job.overrides} if job.overrides else {}
    try:
        if job.method == DENSE:
            row |= {"method": DENSE, "perplexity": measure(model)}
        else:
            with tempfile.TemporaryDirectory() as work:
                log = partial(_say, job.key)
                began = time.process_time()
                outcome = MethodRun(recipe.method, model, recipe, inputs, Path(work), log=log).run()
                row["cpu_seconds"] = time.process_time() - began - measure.cpu_seconds
            row |= vars(outcome.result) | {"rounds": [_round(record) for record in outcome.rounds]}
            row["seconds"] -= measure.seconds
    except NumericsError as error:
        return row | {"failed": str(error)}
    row |= measure.more or {}
    row |= {} if (made_by := commit()) is None else {"commit": made_by}
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
    status = Path("/proc/self/status")
    # Linux's ru_maxrss may be the peak of the process that started this one: it survives exec.
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
