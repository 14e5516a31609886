"""A recipe with ``offload: disk``: pruning of a model of which one decoder block at a time is in memory."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import nn

from losa import __version__
from losa.algorithm.engine import Engine
from losa.algorithm.patterns import check_groups
from losa.algorithm.stream import BlockStream
from losa.distributed.processes import process_count
from losa.distributed.sharding import gathered
from losa.distributed.stop import check
from losa.distributed.watch import progress
from losa.errors import OutputError, RecipeError
from losa.model.blocks import Blocks, as_targets, parameter_uses
from losa.model.offloaded import load_offloaded
from losa.model.wrapping import chosen_linears, matrix_weights, replace_layers, wrap_model, zeros_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.pruned_linear import PrunedLinear
from losa.output.offloaded_export import export_offloaded
from losa.pruners import get_pruner
from losa.recipe.methods import MethodName
from losa.recipe.rates import RATES, tries_widths
from losa.recipe.sections import Recipe
from losa.record import MethodResult, RoundRecord, RunRecord
from losa.run.block_store import BlockStore
from losa.run.documents import belonging
from losa.run.fingerprint import WEIGHTS, joined_digest, tensor_digests
from losa.run.inputs import Inputs, read_inputs
from losa.run.methods import round_line
from losa.run.planned import needs_whole
from losa.run.reporting import environment, log_result, show_written
from losa.run.rounds import rounds_of
from losa.run.share import check_share
from losa.run.workspace import BLOCKS, Workspace

NAME: MethodName = "prune_only"


def check_offload(recipe: Recipe) -> None:
    """Raises RecipeError for what takes more of the model than one block at a time."""
    if recipe.distributed.mode in ("fsdp", "hsdp"):
        raise RecipeError(f"offload: disk holds no shards, got distributed.mode: {recipe.distributed.mode}")
    if process_count() > 1:
        raise RecipeError(f"offload: disk prunes in one process, got {process_count()} processes")
    if setting := needs_whole(recipe):
        raise RecipeError(f"{setting} takes gradients, and needs the model whole, not offloaded")
    pruner, allocation = get_pruner(recipe.prune), recipe.allocation_of(NAME)
    if pruner.structured:
        raise RecipeError(f"offload: disk: {recipe.prune.pruner} makes a smaller model, which needs the model whole")
    if allocation.per != "block":
        raise RecipeError(f"offload: disk: expected allocation.per: block, got {allocation.per}")
    if tries_widths(allocation.rates, allocation.delta):
        raise RecipeError(
            f"offload: disk: allocation.rates: {allocation.rates} tries masks of the whole model; give allocation.delta"
        )
    if RATES[allocation.rates].needs == "linears" and allocation.rates != "uniform":
        raise RecipeError(f"offload: disk: allocation.rates: {allocation.rates} reads all weights at once")


def run_offloaded(
    recipe: Recipe,
    workspace: Workspace,
    device: str,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
    force: bool,
) -> RunRecord:
    """The part of ``losa.run.pipeline.run_recipe`` behind an opened workspace. Pruned blocks are kept there: a later
    process goes on with the first one that is missing."""
    start = time.perf_counter()
    with console.status("loading model and data"):
        model, tokenizer, source = load_offloaded(
            recipe.model, dtype=recipe.dtype, device=device, trust_remote_code=recipe.trust_remote_code
        )
        _check_linears(recipe, source.blocks)
        _check_space(model, workspace.path / NAME / BLOCKS)
        check_share(recipe.prune, model, source.blocks.linears().values())
        inputs = read_inputs(recipe, model, tokenizer)
        check()
        inputs.fingerprint[WEIGHTS], zeros, prunable = _survey(model, source.blocks)
    matrices = matrix_weights(model)
    store = BlockStore(workspace.path / NAME / BLOCKS, source, lambda line: console.print(line, markup=False))
    owner = belonging(recipe, NAME, inputs.fingerprint)
    dense = store.open(owner) if resume else None
    # A model that calibration cannot take block by block is refused here, before any work; one sample shows it.
    BlockStream(model, source.blocks, inputs.calibration[:1], calls=inputs.calls)
    if dense is None:
        began = time.perf_counter()
        value = inputs.evaluate(model)
        dense = MethodResult("dense", value, zeros / prunable, zeros, prunable, time.perf_counter() - began)
        store.begin(owner, dense)
    log_result(console, dense)
    began = time.perf_counter()
    done = sum(each.seconds for each in store.stored)
    record_of_round = _prune(recipe, model, inputs, store)
    console.print(round_line(NAME, record_of_round, 1, ranked=False), markup=False)
    result = _result(model, inputs, store)
    result.seconds = time.perf_counter() - began + done
    log_result(console, result)
    masks = {name: mask for each in store.stored for name, mask in each.masks.items()}
    record = RunRecord(
        losa_version=__version__,
        method=recipe.method,
        recipe=recipe.model_dump(mode="json"),
        model=recipe.model,
        blocks=source.blocks.names,
        environment=environment(model),
        rounds=[record_of_round],
        results=[dense, result],
        masks=masks,
        evaluation=inputs.protocol,
        seconds=time.perf_counter() - start,
        unmasked=matrices - sum(mask.shape[0] * mask.shape[1] for mask in masks.values()),
    )
    with console.status("exporting and checking"):
        workspace.expect(record)
        export_offloaded(
            source,
            tokenizer,
            recipe.output,
            record,
            {each.path: each.sha256 for each in store.stored},
            overwrite=overwrite,
            force=force,
            sample_ids=inputs.calibration[:1, :64],
        )
        workspace.close()
    show_written(console, record, recipe.output)
    return record


def _check_linears(recipe: Recipe, blocks: Blocks) -> None:
    """What pruning would find wrong hours later. Raises ModelError: a target that matches nothing; RecipeError: inputs
    that a pattern does not divide."""
    uses = parameter_uses(blocks.model)
    chosen = chosen_linears(blocks, uses, as_targets(recipe.prune.targets), set())
    check_groups(recipe.prune, {name: cast(int, linear.in_features) for name, linear in chosen.items()})


def _check_space(model: nn.Module, blocks: Path) -> None:
    """Raises OutputError where what is still to be written of the model does not fit on the disk of its blocks."""
    there = blocks.parent.parent
    written = sum(file.stat().st_size for file in blocks.glob("*.safetensors"))
    wanted = sum(p.nbytes for p in model.parameters()) - written
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise OutputError(f"output: {there} needs {wanted / 1e9:.3g} GB of disk, {free / 1e9:.3g} GB are free")


def _prune(recipe: Recipe, model: nn.Module, inputs: Inputs, store: BlockStore) -> RoundRecord:
    """Prune all blocks that are not in the store. The linears are plain again then, without weights."""
    torch.manual_seed(recipe.seed)
    wrapped = wrap_model(model, layer=PrunedLinear, rank=1, scaling=1.0, targets=recipe.prune.targets, seed=recipe.seed)
    # Again: linears that the model does not call, or that compute something else, show only now.
    check_share(recipe.prune, model, wrapped.values())
    engine = Engine(
        model,
        inputs.calibration,
        recipe.prune,
        recipe.allocation_of(NAME),
        recipe.calibration,
        measure_errors=False,
        seed=recipe.seed,
        calls=inputs.calls,
        finished=store,
    )
    (this_round,) = rounds_of(NAME, recipe, 0)
    record = engine.run_round(this_round)
    replace_layers(model, MaskedLoRALinear.unwrap)
    return record


def _result(model: nn.Module, inputs: Inputs, store: BlockStore) -> MethodResult:
    kept = sum(sum(each.finished.kept.values()) for each in store.stored)
    weights = sum(mask.shape[0] * mask.shape[1] for each in store.stored for mask in each.masks.values())
    zeros, prunable = (sum(counts) for counts in zip(*((s.zeros, s.prunable) for s in store.stored), strict=True))
    return MethodResult(NAME, inputs.evaluate(model), 1 - kept / weights, zeros, prunable, 0.0)


def _survey(model: nn.Module, blocks: Blocks) -> tuple[str, int, int]:
    """The model's digest (``losa.run.fingerprint.model_digest``), and zeros and weights of its blocks' linears, from
    one look at every block. Weights that are not finite are named here."""
    zeros = prunable = 0
    digests = tensor_digests(
        {name: tensor for name, tensor in model.state_dict().items() if blocks.index_of(name) is None}
    )
    for name, block in zip(blocks.names, blocks, strict=True):
        progress(f"comparing weights of {name}")
        check()
        with gathered(block):
            digests |= tensor_digests({f"{name}.{part}": tensor for part, tensor in block.state_dict().items()})
            own = zeros_of(block)
        zeros, prunable = zeros + own[0], prunable + own[1]
    return joined_digest(digests), zeros, prunable
