"""One recipe, start to finish: load, evaluate dense, run every method in the same harness, export, report."""

from __future__ import annotations

import json
import platform
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from torch import nn

import losa
import losa_kernels
from losa.data import calibration_tokens, evaluation_tokens, training_sequences
from losa.errors import OutputError
from losa.evaluate import perplexity
from losa.export import export_model, mask_records
from losa.files import check_output, write_json
from losa.loading import load_model
from losa.methods import Inputs, MethodRun, Outcome
from losa.model import block_linears, find_blocks, sparsity_of
from losa.pruners import get_pruner
from losa.recipe import Recipe
from losa.record import MethodResult, RunRecord
from losa.report import results_table, show_table


def run_recipe(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> RunRecord:
    """Run a recipe and write its output directory.

    Methods in ``recipe.compare`` run first, the main one last; all start from the same dense weights and see the
    same tokens. Unfinished work lives in ``<output>.work`` beside the output and is removed at the end.

    Args:
        resume: go on after the last finished round of an interrupted run.
        overwrite: replace an existing output and throw away unfinished work.

    Raises:
        LosaError: bad input, failed numerics or an output that fails its check; nothing half-written stays.
    """
    process = PartialState(cpu=recipe.device == "cpu" or not torch.cuda.is_available())
    if not process.is_main_process:
        console = Console(quiet=True)
    console = console or Console()
    start = time.perf_counter()
    get_pruner(recipe.prune)  # a pruner that does not exist should not cost a model's loading
    work_dir = _work_directory(recipe)
    if process.is_main_process:
        check_output(recipe.output, overwrite)
        _start_work(work_dir, resume, overwrite)
    process.wait_for_everyone()
    _seed_everything(recipe)

    with console.status("loading model and data"):
        model, tokenizer = load_model(
            recipe.model,
            gguf_file=recipe.gguf_file,
            dtype=recipe.dtype,
            device=str(process.device) if recipe.device == "auto" and process.num_processes > 1 else recipe.device,
            trust_remote_code=recipe.trust_remote_code,
        )
        inputs, evaluation = _inputs(recipe, tokenizer)
    name, blocks = find_blocks(model)
    record = RunRecord(
        losa_version=losa.__version__,
        method=recipe.method,
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model,
        blocks=[f"{name}.{i}" for i in range(len(blocks))],
        environment=_environment(model),
        evaluation=evaluation,
    )
    record.results.append(_dense_result(model, inputs))
    _log_result(console, record.results[-1])

    # The linears themselves, references and not copies: to restore is to put these modules back.
    originals = block_linears(model)
    outcome: Outcome | None = None
    methods = [m for m in dict.fromkeys(recipe.compare) if m != recipe.method] + [recipe.method]
    for method in methods:
        saved = work_dir / f"{method}.json"
        if resume and method != recipe.method and saved.exists():
            record.results.append(MethodResult(**json.loads(saved.read_text())))
            continue
        _restore(model, originals)
        torch.manual_seed(recipe.seed)
        outcome = MethodRun(method, model, recipe, inputs, work_dir, log=console.print).run(resume=resume)
        record.results.append(outcome.result)
        if process.is_main_process:
            write_json(saved, vars(outcome.result))
        _log_result(console, outcome.result)
    record.rounds = outcome.rounds
    record.masks = mask_records(outcome.masks, {name: linear.in_features for name, linear in originals.items()})
    record.seconds = time.perf_counter() - start
    if not process.is_main_process:
        process.wait_for_everyone()
        return record
    metrics = [p for m in methods if (p := work_dir / m / "metrics.jsonl").exists()]
    with console.status("exporting and checking"):
        export_model(
            model,
            tokenizer,
            recipe.output,
            record,
            outcome.masks,
            overwrite=overwrite,
            sample_ids=inputs.calibration[:1, :64],
            extra_files={f"metrics-{p.parent.name}.jsonl": p for p in metrics},
        )
    shutil.rmtree(work_dir, ignore_errors=True)
    process.wait_for_everyone()
    show_table(results_table(record), console)
    console.print(f"written to {recipe.output}: " + ", ".join(sorted(p.name for p in recipe.output.iterdir())))
    return record


def _work_directory(recipe: Recipe) -> Path:
    return recipe.output.parent / f"{recipe.output.name}.work"


def _start_work(work: Path, resume: bool, overwrite: bool) -> None:
    if work.exists() and not resume:
        if not overwrite:
            raise OutputError(
                f"output: unfinished work in {work}; continue it with --resume or discard with --overwrite"
            )
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output: cannot create {work} ({error.strerror})") from error


def _seed_everything(recipe: Recipe) -> None:
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)


def _inputs(recipe: Recipe, tokenizer) -> tuple[Inputs, dict | None]:
    c, t, e = recipe.calibration, recipe.train, recipe.evaluate
    calibration = calibration_tokens(c.data, tokenizer, c.samples, c.length, recipe.seed)
    training = None
    if t is not None:
        training = training_sequences(t.data, tokenizer, t.length, recipe.seed, t.train_on, t.max_tokens)
    if e is None:
        return Inputs(calibration, training, lambda model: None), None
    tokens = evaluation_tokens(e.data, tokenizer)
    windows = len(tokens) // e.length
    if e.max_windows is not None:
        windows = min(windows, e.max_windows)
    protocol = {"data": e.data.model_dump(), "length": e.length, "windows": windows, "tokens": windows * e.length}

    def evaluate(model: nn.Module) -> float:
        return perplexity(model, tokens, e.length, e.batch_size, e.max_windows).value

    return Inputs(calibration, training, evaluate), protocol


def _dense_result(model, inputs: Inputs) -> MethodResult:
    start = time.perf_counter()
    value = inputs.evaluate(model)
    zeros, prunable = sparsity_of(model)
    return MethodResult("dense", value, zeros / prunable, zeros, prunable, time.perf_counter() - start)


def _restore(model, originals: dict[str, nn.Linear]) -> None:
    for name, linear in originals.items():
        model.set_submodule(name, linear)


def _environment(model) -> dict:
    device = next(model.parameters()).device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "losa_kernels": losa_kernels.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _log_result(console: Console, result: MethodResult) -> None:
    value = "" if result.perplexity is None else f", perplexity {result.perplexity:.2f}"
    console.print(f"{result.method}: sparsity {result.sparsity:.3f}{value}, {result.seconds:.0f} s")
