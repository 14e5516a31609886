"""One recipe, start to finish: load, evaluate dense, run every method in the same harness, export, report."""

from __future__ import annotations

import json
import platform
import random
import time
from contextlib import ExitStack

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import nn

import losa
import losa_kernels
from losa.algorithm.stream import BlockStream
from losa.data.tokens import calibration_tokens, evaluation_tokens, training_sequences
from losa.distributed import check_agreement, is_main, on_main, start_processes
from losa.evaluation.perplexity import evaluation_windows, perplexity, warn_of_missing_start, window_start
from losa.model.blocks import find_blocks
from losa.model.loading import load_model
from losa.model.wrapping import sparsity_of
from losa.output.export import export_model, mask_records
from losa.output.tables import results_table, show_table
from losa.pruners import get_pruner
from losa.recipe.sections import Recipe
from losa.record import MethodResult, RunRecord
from losa.run.fingerprint import CALIBRATION, EVALUATION, TRAINING, WEIGHTS, model_digest, tensor_digest
from losa.run.inputs import check_inputs
from losa.run.methods import Inputs, MethodRun, Outcome
from losa.run.resume import check_saved, load_result, save_result
from losa.run.workspace import Workspace
from losa.storage.lock import claimed


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> RunRecord:
    """Run a recipe and write its output directory.

    Methods in ``recipe.compare`` run first, the main one last; all start from the same dense weights and see the
    same tokens. Unfinished work lives in ``<output>.work`` beside the output and is removed at the end, and at a
    failure before the first method or round is finished.

    Args:
        resume: go on after the last finished round of an interrupted run. Where the output is complete already, its
            record is returned and nothing is done but cleaning up.
        overwrite: replace an existing output that losa wrote and throw away unfinished work.
        force: replace an existing output whoever wrote it.

    Raises:
        LosaError: bad input, failed numerics, another process works on the same output, finished work belongs to
            another recipe, model or data, or an output that fails its check; nothing half-written stays.
    """
    overwrite = overwrite or force
    device = start_processes(recipe.device)
    if not is_main():
        console = Console(quiet=True)
    console = console or Console()
    get_pruner(recipe.prune)  # a pruner that does not exist should not cost a model's loading
    workspace = Workspace(recipe.output)
    with ExitStack() as stack:

        def open_workspace() -> RunRecord | None:
            stack.enter_context(claimed(recipe.output))
            return workspace.open(recipe, resume=resume, overwrite=overwrite, force=force)

        finished = on_main(open_workspace)
        if finished is not None:
            console.print(f"{recipe.output}: complete already; --overwrite makes it anew", markup=False)
            return finished
        if is_main():
            stack.enter_context(workspace.kept_if_worth_it())
        return _run(recipe, workspace, device, resume, overwrite, force, console)


def _run(
    recipe: Recipe, workspace: Workspace, device: str, resume: bool, overwrite: bool, force: bool, console: Console
) -> RunRecord:
    start = time.perf_counter()
    work_dir = workspace.path
    methods = [m for m in dict.fromkeys(recipe.compare) if m != recipe.method] + [recipe.method]
    _seed_everything(recipe)

    with console.status("loading model and data"):
        model, tokenizer = load_model(
            recipe.model,
            gguf_file=recipe.gguf_file,
            dtype=recipe.dtype,
            device=device,
            trust_remote_code=recipe.trust_remote_code,
        )
        inputs, evaluation = _inputs(recipe, model, tokenizer)
        inputs.fingerprint[WEIGHTS] = model_digest(model)
    for what, digest in inputs.fingerprint.items():
        check_agreement(what, digest)
    if resume:
        on_main(lambda: check_saved(work_dir, recipe, methods, inputs.fingerprint))
    blocks = find_blocks(model)
    # A model that calibration cannot take block by block is refused here, before any work; one sample shows it.
    BlockStream(model, blocks, inputs.calibration[:1], calls=inputs.calls)
    record = RunRecord(
        losa_version=losa.__version__,
        method=recipe.method,
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model,
        blocks=blocks.names,
        environment=_environment(model),
        evaluation=evaluation,
    )
    record.results.append(_dense_result(model, inputs))
    _log_result(console, record.results[-1])

    # The linears themselves, references and not copies: to restore is to put these modules back.
    originals = blocks.linears()
    outcome: Outcome | None = None
    for method in methods:
        if resume and method != recipe.method:
            saved = load_result(work_dir, method, recipe, inputs.fingerprint)
            check_agreement(f"result of {method}", "none" if saved is None else json.dumps(vars(saved)))
            if saved is not None:
                record.results.append(saved)
                continue
        _restore(model, originals)
        torch.manual_seed(recipe.seed)
        outcome = MethodRun(method, model, recipe, inputs, work_dir, log=console.print).run(resume=resume)
        record.results.append(outcome.result)
        if is_main() and method != recipe.method:
            save_result(work_dir, outcome.result, recipe, inputs.fingerprint)
        _log_result(console, outcome.result)
    record.rounds = outcome.rounds
    record.masks = mask_records(outcome.masks, {name: linear.in_features for name, linear in originals.items()})
    record.seconds = time.perf_counter() - start
    metrics = [p for m in methods if (p := work_dir / m / "metrics.jsonl").exists()]

    def export() -> None:
        workspace.expect(record)
        export_model(
            model,
            tokenizer,
            recipe.output,
            record,
            outcome.masks,
            overwrite=overwrite,
            force=force,
            sample_ids=inputs.calibration[:1, :64],
            extra_files={f"metrics-{p.parent.name}.jsonl": p for p in metrics},
        )
        workspace.close()

    with console.status("exporting and checking"):
        on_main(export)
    if is_main():
        show_table(results_table(record), console)
        console.print(f"written to {recipe.output}: " + ", ".join(sorted(p.name for p in recipe.output.iterdir())))
    return record


def _seed_everything(recipe: Recipe) -> None:
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)


def _inputs(recipe: Recipe, model, tokenizer) -> tuple[Inputs, dict | None]:
    c, t, e = recipe.calibration, recipe.train, recipe.evaluate
    calibration = calibration_tokens(c.data, tokenizer, c.samples, c.length, recipe.seed)
    training = None
    if t is not None:
        training = training_sequences(t.data, tokenizer, t.length, recipe.seed, t.train_on, t.max_tokens)
    fingerprint = {CALIBRATION: tensor_digest(calibration)}
    if training is not None:
        fingerprint[TRAINING] = tensor_digest(training.input_ids, training.labels)
    if e is None:
        check_inputs(model, recipe, calibration, training, None)
        return Inputs(calibration, training, lambda model: None, fingerprint), None
    tokens = evaluation_tokens(e.data, tokenizer)
    fingerprint[EVALUATION] = tensor_digest(tokens)
    bos = window_start(tokenizer, "evaluate.bos_per_window") if e.bos_per_window else None
    windows = evaluation_windows(tokens, e.length, e.max_windows, bos)
    check_inputs(model, recipe, calibration, training, windows)
    if bos is None:
        warn_of_missing_start(model, tokenizer, tokens, e.length)
    text = len(windows) * (e.length - (bos is not None))
    protocol = {"data": e.data.model_dump(), "length": e.length, "windows": len(windows), "tokens": text}
    if bos is not None:
        protocol["bos_per_window"] = True

    def evaluate(model: nn.Module) -> float:
        return perplexity(model, tokens, e.length, e.batch_size, e.max_windows, bos=bos).value

    return Inputs(calibration, training, evaluate, fingerprint), protocol


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
