"""The merged model as an ordinary Hugging Face directory, checked before it gets its name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from losa.distributed.sharding import device_of
from losa.errors import OutputError
from losa.model.auto_class import auto_class
from losa.model.blocks import find_blocks
from losa.model.processors import copy_processors
from losa.model.running import evaluating
from losa.model.saving import state_untied, untied_though_stated
from losa.model.wrapping import sparsity_of
from losa.output.card import model_card
from losa.output.checks import (
    check_logits,
    check_masked,
    check_masked_names,
    check_merged,
    check_same_names,
    check_tensor,
    check_tokenizer,
    check_zeros,
    some_ids,
)
from losa.output.figures import write_figures
from losa.record import RunRecord
from losa.storage.files import RECORD, WRITE_ERRORS, staged_directory, write_json, write_text

logger = logging.getLogger("losa")

# What the config of a base model may say of its storage. The export is plain dense tensors, and loaders that read the
# last two keys would refuse it.
STORAGE_KEYS = ("quantization_config", "sparsity_config", "compression_config")


def export_model(
    model: nn.Module,
    tokenizer,
    output: Path,
    record: RunRecord,
    masks: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
    force: bool = False,
    sample_ids: Tensor | None = None,
    extra_files: Mapping[str, Path] | None = None,
) -> None:
    """Write safetensors, config, tokenizer, generation config, model card, ``losa_config.json`` and figures.

    Args:
        model: merged, plain linears only.
        tokenizer: None writes none.
        record: its ``masks`` must be the records of ``masks``.
        masks: packed mask of every pruned linear by full name; the zeros are checked against them.
        sample_ids: (batch, length) int64 tokens for the check of logits; None takes some of the vocabulary.
        extra_files: copied in under the given names.

    Raises:
        OutputError: the model cannot be written, or the written model differs from the model in memory. ``output`` is
            then as it was before.
        ValueError: the model still has adapters.
    """
    check_merged(model)
    with staged_directory(output, overwrite, force) as staged:
        save_model(model, tokenizer, staged, untied=untied_though_stated(model))
        write_report(staged, record, extra_files or {})
        check_export(staged, model, tokenizer, record, masks, sample_ids)


def write_report(directory: Path, record: RunRecord, extra_files: Mapping[str, Path]) -> None:
    """Write what an output says of its run, and copies of files under the given names."""
    write_json(directory / RECORD, record.to_dict())
    write_text(directory / "README.md", model_card(record))
    write_figures(record, directory / "figures")
    for name, source in extra_files.items():
        shutil.copyfile(source, directory / name)


def save_model(model: Any, tokenizer, directory: Path, *, untied: bool, **options) -> None:
    """``save_pretrained`` of model and tokenizer, with a config.json that says nothing of storage, and the files of
    processors.

    Args:
        untied: ``untied_though_stated`` of the model.
        options: of the model's ``save_pretrained``.

    Raises:
        OutputError: transformers refuses to save the model. Failed writes stay what they are.
    """
    try:
        model.save_pretrained(directory, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
            copy_processors(tokenizer, directory)
    except WRITE_ERRORS:
        raise
    except Exception as error:  # transformers raises errors of many kinds
        raise OutputError(f"export: transformers cannot save this model: {error}") from error
    if untied:
        state_untied(directory)
    path = directory / "config.json"
    for file in directory.glob("*.safetensors"):
        give_mode_of(path, file)
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if stated := [(part, key) for part in parts for key in STORAGE_KEYS if key in part]:
        for part, key in stated:
            del part[key]
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def give_mode_of(other: Path, file: Path) -> None:
    """safetensors writes for the owner only, whatever the umask."""
    file.chmod(other.stat().st_mode)


def check_export(
    directory: Path,
    model: nn.Module,
    tokenizer,
    record: RunRecord,
    masks: Mapping[str, Tensor],
    sample_ids: Tensor | None = None,
) -> int:
    """Load a written model as any user would and compare it with the model in memory.

    Every tensor is finite and equal to the bit; every pruned weight is +0.0; masks and counts agree with the record;
    logits on ``sample_ids`` are equal to the bit; the tokenizer gives the same tokens and chat template.

    Returns:
        the number of kept weights that are zero. They are allowed: the mask says that they are kept.

    Raises:
        OutputError: says which of these checks fails, and where.
    """
    from transformers import AutoConfig, AutoTokenizer

    trust = {"trust_remote_code": bool(record.recipe.get("trust_remote_code", False))}
    try:
        # "auto": the type that config.json states, which is what users get.
        config = AutoConfig.from_pretrained(directory, **trust)
        reloaded = auto_class(config).from_pretrained(directory, config=config, dtype="auto", **trust).eval()
        written = None if tokenizer is None else AutoTokenizer.from_pretrained(directory, **trust)
    except Exception as error:  # transformers raises errors of many kinds
        raise OutputError(f"export: the written model cannot be loaded: {error}") from error
    sample_ids = some_ids(model) if sample_ids is None else sample_ids
    kept_zeros = _check_masks(reloaded, record, masks)
    memory = model.state_dict()
    check_same_names(reloaded.state_dict(), memory)
    for name, tensor in reloaded.state_dict().items():
        check_tensor(name, tensor, memory[name].cpu())
    _check_logits(reloaded, model, sample_ids)
    if tokenizer is not None:
        check_tokenizer(written, tokenizer, sample_ids)
    if kept_zeros:
        logger.info("export: %d kept weights are zero", kept_zeros)
    return kept_zeros


def _check_masks(reloaded: nn.Module, record: RunRecord, masks: Mapping[str, Tensor]) -> int:
    check_masked_names(record, masks)
    kept_zeros, linears = 0, find_blocks(reloaded).linears()
    for name, mask in masks.items():
        if name not in linears:
            raise OutputError(f"export: the written model has no {name}.weight")
        weight = cast(Tensor, linears[name].weight)
        kept_zeros += check_masked(name, weight, mask, record.masks[name])
    check_zeros(record, *sparsity_of(reloaded))
    return kept_zeros


def _check_logits(reloaded: nn.Module, model: nn.Module, sample_ids: Tensor) -> None:
    """What the written model computes, with the tensors of the one in memory, to which its own are equal: so nobody
    copies them, and both read memory that is aligned alike, without which products may round differently."""
    device = device_of(model)
    ids, parameters = sample_ids.to(device), dict(model.named_parameters(remove_duplicate=False))
    with evaluating(model):
        expected = _logits(model, ids)
    for name, parameter in reloaded.named_parameters(remove_duplicate=False):
        if name not in parameters:
            raise OutputError(f"export: {name} is a parameter of the written model, and not of the one in memory")
        parameter.data = parameters[name].data
    check_logits(_logits(reloaded.to(device), ids), expected)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (batch, length, vocabulary) on the host."""
    return model(ids, use_cache=False).logits.cpu()
