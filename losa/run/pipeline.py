"""One recipe from start to finish: load, evaluate dense, run every method in the same harness, export, report."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

from losa import __version__
from losa.algorithm.stream import BlockStream
from losa.algorithm.structure import shrink
from losa.distributed.agreement import check_shared
from losa.distributed.launch import working_together
from losa.distributed.processes import check_agreement, is_main, on_main, process_count
from losa.distributed.sharding import sharding_of
from losa.distributed.stop import check
from losa.distributed.turns import everywhere, on_each_machine
from losa.distributed.watch import progress
from losa.model.blocks import Blocks, find_blocks
from losa.model.hub_files import local_directory
from losa.model.loading import configured_model, load_model, locate_model, torch_device
from losa.model.norms import find_norms
from losa.model.sharded_loading import load_sharded
from losa.model.wrapping import matrix_weights, sparsity_of
from losa.output.checks import mask_records
from losa.output.sharded_export import export_together
from losa.pruners import get_pruner
from losa.recipe.methods import check_packages
from losa.recipe.sections import Recipe
from losa.record import MethodResult, RunRecord
from losa.run.choice import placement_of
from losa.run.fingerprint import WEIGHTS, model_digest
from losa.run.inputs import Inputs, read_inputs
from losa.run.memory_gate import check_memory
from losa.run.methods import MethodRun, Outcome
from losa.run.offloaded import check_offload, run_offloaded
from losa.run.placement import Placement
from losa.run.pruning import check_prunable, check_pruner, experts_are_reached
from losa.run.random_state import seed_generators
from losa.run.reporting import environment, log_result, show_written
from losa.run.resume import check_saved, load_result, save_result
from losa.run.share import check_share
from losa.run.workspace import Workspace
from losa.storage.lock import claimed
from losa.storage.tensor_files import INDEX, WHOLE
from losa.training.metrics import METRICS
from losa.training.shell import check_unreached


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> RunRecord:
    """Run a recipe and write its output directory.

    Methods in ``recipe.compare`` run first, ``recipe.method`` runs last; all start from the same dense weights and see
    the same tokens. Unfinished work lives in ``<output>.work`` beside the output. It is removed at the end, and at a
    failure before the first method or round is finished.

    Args:
        resume: go on where an interrupted run was saved last. Where the output is complete already, only
            unfinished work is cleaned up.
        overwrite: replace an existing output that losa wrote and throw away unfinished work.
        force: replace an existing output whoever wrote it, and go on where the run's plan asks for more memory than
            there is.
        console: gets progress, results and warnings; default: standard output. Only the main process writes.

    Returns:
        the record, which the output holds as ``losa_config.json``.

    Raises:
        LosaError: bad input, failed numerics, another process works on the same output, finished work belongs to
            another recipe, model or data, or an output that fails its check; nothing half-written stays.
    """
    overwrite = overwrite or force
    settings = {"recipe": recipe.model_dump(mode="json"), "resume": resume, "overwrite": overwrite, "force": force}
    with ExitStack() as stack:
        device = stack.enter_context(working_together(recipe.device, recipe.distributed, settings))
        if not is_main():
            console = Console(quiet=True)
        console = console or Console()
        check_pruner(recipe)  # a pruner that does not exist or suit the recipe should not cost a model's loading
        check_packages(recipe.methods)
        if recipe.offload is not None:
            check_offload(recipe)

        def placed() -> Placement:
            placement = Placement() if recipe.offload is not None else placement_of(recipe, device)
            if not force:
                check_memory(recipe, placement, device, console)
            return placement

        placement = None if resume else placed()  # before unfinished work is thrown away
        workspace = Workspace(recipe.output)

        def open_workspace() -> RunRecord | None:
            stack.enter_context(claimed(recipe.output))
            return workspace.open(recipe, resume=resume, overwrite=overwrite, force=force)

        finished = on_main(open_workspace)
        if finished is not None:
            console.print(f"{recipe.output}: complete already; --overwrite makes it anew", markup=False)
            return finished
        if is_main():
            stack.enter_context(workspace.kept_if_worth_it())
        check_shared(workspace.path)
        if placement is None:  # what is complete needs no plan
            placement = placed()
        seed_generators(recipe.seed)
        if recipe.deterministic:
            torch.use_deterministic_algorithms(True)
        run = partial(_run, placement) if recipe.offload is None else run_offloaded
        return run(recipe, workspace, device, console, resume=resume, overwrite=overwrite, force=force)


def _run(
    placement: Placement,
    recipe: Recipe,
    workspace: Workspace,
    device: str,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
    force: bool,
) -> RunRecord:
    start = time.perf_counter()
    with console.status("loading model and data"):
        model, tokenizer = _load(recipe, placement, device, console)
        check_prunable(recipe, model)
        check()
        inputs = read_inputs(recipe, model, tokenizer)
        check()
        progress("comparing weights")
        inputs.fingerprint[WEIGHTS] = model_digest(model)
        check_agreement(WEIGHTS, inputs.fingerprint[WEIGHTS])
    check()
    if resume:
        on_main(lambda: check_saved(workspace.path, recipe, recipe.methods, inputs.fingerprint))
    blocks = find_blocks(model)
    check_share(recipe.prune, model, blocks.linears().values())
    if sharding_of(model) is not None and process_count() > 1:
        check_unreached(experts_are_reached(recipe, blocks))
    # A model that calibration cannot take block by block is refused here, before any work; one sample shows it.
    BlockStream(model, blocks, inputs.calibration[:1], calls=inputs.calls)

    dense = _dense_result(model, inputs)
    log_result(console, dense)
    results, outcome = _run_methods(recipe, blocks, inputs, workspace, console, resume)
    sample_ids, shrunk = inputs.calibration[:1, :64], None
    if get_pruner(recipe.prune).structured:
        outcome.masks, shrunk = shrink(model, outcome.masks, sample_ids)
    in_features = {name: cast(int, linear.in_features) for name, linear in blocks.linears().items()}
    masks = mask_records(outcome.masks, in_features)
    record = RunRecord(
        losa_version=__version__,
        method=recipe.method,
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model,
        blocks=blocks.names,
        environment=environment(model),
        rounds=outcome.rounds,
        results=[dense, *results],
        masks=masks,
        evaluation=inputs.protocol,
        seconds=time.perf_counter() - start,
        shrunk=shrunk,
        unmasked=matrix_weights(model) - sum(math.prod(mask.shape) for mask in masks.values()),
    )
    metrics = {name: workspace.path / name / METRICS for name in recipe.methods}

    with console.status("exporting and checking"):
        on_main(lambda: workspace.expect(record))
        export_together(
            model,
            tokenizer,
            recipe.output,
            record,
            outcome.masks,
            overwrite=overwrite,
            force=force,
            sample_ids=sample_ids,
            extra_files={f"metrics-{name}.jsonl": path for name, path in metrics.items() if path.exists()},
        )
        on_main(workspace.close)
    if is_main():
        show_written(console, record, recipe.output)
    return record


def _load(recipe: Recipe, placement: Placement, device: str, console: Console) -> tuple[nn.Module, object]:
    """The recipe's model, whole or this process's rows of it, and its tokenizer."""
    source = _fetch(recipe) if process_count() > 1 else recipe.model
    if placement.mode != "whole":
        console.print(f"distributed: {placement.processes} processes, {placement.mode}: {placement.text}", markup=False)
    sharding = placement.sharding(torch_device(device))
    how: dict[str, Any] = {"gguf_file": recipe.gguf_file, "dtype": recipe.dtype}
    how["trust_remote_code"] = recipe.trust_remote_code
    if sharding is None:
        progress(f"loading {recipe.model}")
        if recipe.trust_remote_code and process_count() > 1:
            # transformers copies the model's Python files to where it imports them from. One process copies.
            on_each_machine(partial(configured_model, source, recipe.gguf_file, trust_remote_code=True))
        return load_model(source, device=device, **how)
    return load_sharded(source, sharding, **how)


def _fetch(recipe: Recipe) -> str:
    """What all processes load: the directory of one revision. A model of the hub is downloaded once for all processes
    of a machine. They wait for that however long it takes, as they would not for a download by each process."""
    source, file = everywhere(partial(locate_model, recipe.model, recipe.gguf_file))
    if file is not None:
        return recipe.model
    directory = local_directory(recipe.model, source, recipe.trust_remote_code)
    # Weights in other formats were not fetched: transformers gets them, by the hub's name.
    found = any((directory / name).is_file() for name in (WHOLE, INDEX))
    return str(directory) if found else recipe.model


def _run_methods(
    recipe: Recipe, blocks: Blocks, inputs: Inputs, workspace: Workspace, console: Console, resume: bool
) -> tuple[list[MethodResult], Outcome]:
    """Every method on the same dense weights, the exported one last.

    Returns:
        the results of all methods, saved results among them, and the outcome of the last method, whose merged model is
        now the model.
    """
    # The modules themselves, references and not copies: to restore is to put these back.
    originals = blocks.holders() | find_norms(blocks)
    work_dir, processes = workspace.path, on_main(workspace.processes)
    results: list[MethodResult] = []
    for name in recipe.methods:
        exported = name == recipe.method
        if resume and not exported:
            saved = load_result(work_dir, name, recipe, inputs.fingerprint)
            check_agreement(f"result of {name}", "none" if saved is None else json.dumps(vars(saved)))
            if saved is not None:
                results.append(saved)
                continue
        _put_back(blocks.model, originals)
        if exported:
            originals.clear()  # nobody restores after this method, and merged weights are to take their place
        torch.manual_seed(recipe.seed)
        method = MethodRun(name, blocks.model, recipe, inputs, work_dir, processes=processes, log=console.print)
        outcome = method.run(resume=resume)
        results.append(outcome.result)
        if not exported:
            on_main(partial(save_result, work_dir, outcome.result, recipe, inputs.fingerprint))
        log_result(console, outcome.result)
    return results, outcome


def _put_back(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def _dense_result(model: nn.Module, inputs: Inputs) -> MethodResult:
    start = time.perf_counter()
    value = inputs.evaluate(model)
    zeros, prunable = sparsity_of(model)
    return MethodResult("dense", value, zeros / prunable, zeros, prunable, time.perf_counter() - start)
