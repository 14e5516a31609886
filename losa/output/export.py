"""The merged model as an ordinary Hugging Face directory, checked before it gets its name."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import OutputError
from losa.model.saving import state_untied, untied_though_stated
from losa.model.wrapping import sparsity_of, wrapped_linears
from losa.output.card import model_card
from losa.output.figures import write_figures
from losa.record import MaskRecord, RunRecord
from losa.storage.files import RECORD, WRITE_ERRORS, staged_directory, write_json, write_text
from losa_kernels import unpack_mask
from losa_kernels.tensors import as_bits

logger = logging.getLogger("losa")

# What the config of a base model may say of its storage. The export is plain dense tensors, and loaders that read the
# last two keys would refuse it.
STORAGE_KEYS = ("quantization_config", "sparsity_config", "compression_config")


def mask_records(masks: Mapping[str, Tensor], in_features: Mapping[str, int]) -> dict[str, MaskRecord]:
    """Checksum and counts of packed masks (out, ceil(in/8)), by linear name."""
    records = {}
    for name, mask in masks.items():
        mask = mask.detach().cpu().contiguous()
        kept = unpack_mask(mask, in_features[name])
        digest = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
        records[name] = MaskRecord(digest, list(kept.shape), int(kept.sum()))
    return records


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
        model: merged, plain linears only. On a GPU it waits in host memory while the written one is checked there.
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
    if left := list(wrapped_linears(model)):
        raise ValueError(f"model: expected a merged model, found {len(left)} adapters ({left[0]}); merge_model first")
    with staged_directory(output, overwrite, force) as staged:
        _save(model, tokenizer, staged)
        write_json(staged / RECORD, record.to_dict())
        write_text(staged / "README.md", model_card(record))
        write_figures(record, staged / "figures")
        for name, source in (extra_files or {}).items():
            shutil.copyfile(source, staged / name)
        check_export(staged, model, tokenizer, record, masks, sample_ids)


def _save(model: Any, tokenizer, directory: Path) -> None:
    try:
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    except WRITE_ERRORS:
        raise
    except Exception as error:  # transformers raises errors of many kinds
        raise OutputError(f"export: transformers cannot save this model: {error}") from error
    if untied_though_stated(model):
        state_untied(directory)
    path = directory / "config.json"
    for file in directory.glob("*.safetensors"):
        file.chmod(path.stat().st_mode)  # safetensors writes for the owner only, whatever the umask
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if stated := [(part, key) for part in parts for key in STORAGE_KEYS if key in part]:
        for part, key in stated:
            del part[key]
        write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = {"trust_remote_code": bool(record.recipe.get("trust_remote_code", False))}
    try:
        # "auto": the type that config.json states, which is what users get.
        reloaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **trust).eval()
        written = None if tokenizer is None else AutoTokenizer.from_pretrained(directory, **trust)
    except Exception as error:  # transformers raises errors of many kinds
        raise OutputError(f"export: the written model cannot be loaded: {error}") from error
    if sample_ids is None:
        transformer: Any = model
        vocabulary = transformer.get_input_embeddings().weight.shape[0]
        sample_ids = torch.arange(min(64, vocabulary))[None]
    kept_zeros = _check_masks(reloaded, record, masks)
    _check_tensors(reloaded, model)
    _check_logits(reloaded, model, sample_ids)
    if tokenizer is not None:
        _check_tokenizer(written, tokenizer, sample_ids)
    if kept_zeros:
        logger.info("export: %d kept weights are zero", kept_zeros)
    return kept_zeros


def _check_masks(reloaded: nn.Module, record: RunRecord, masks: Mapping[str, Tensor]) -> int:
    if odd := sorted(set(masks) ^ set(record.masks)):
        raise OutputError(f"export: {odd[0]} (of {len(odd)}) has a mask in the model or in the record, not in both")
    kept_zeros = 0
    for name, mask in masks.items():
        try:
            weight = reloaded.get_parameter(f"{name}.weight")
        except AttributeError as error:
            raise OutputError(f"export: the written model has no {name}.weight") from error
        expected = record.masks[name]
        if list(weight.shape) != expected.shape:
            raise OutputError(f"export: {name}.weight: shape {list(weight.shape)}, the record says {expected.shape}")
        if (found := mask_records({name: mask}, {name: weight.shape[1]})[name]) != expected:
            raise OutputError(f"export: {name}: the mask keeps {found.kept} weights and is not the record's")
        kept = unpack_mask(mask.cpu(), weight.shape[1])
        if wrong := int((as_bits(weight)[~kept] != 0).sum()):
            raise OutputError(f"export: {name}.weight: {wrong} pruned weights are not +0.0")
        kept_zeros += expected.kept - int(torch.count_nonzero(weight))
    result = next((r for r in reversed(record.results) if r.method == record.method), None)
    if result is not None and (counted := sparsity_of(reloaded)) != (result.zeros, result.prunable):
        told = f"the record says {result.zeros} of {result.prunable}"
        raise OutputError(f"export: {counted[0]} of {counted[1]} weights in blocks are zero, {told}")
    return kept_zeros


def _check_tensors(reloaded: nn.Module, model: nn.Module) -> None:
    written, memory = reloaded.state_dict(), model.state_dict()
    if odd := sorted(set(written) ^ set(memory)):
        raise OutputError(f"export: {odd[0]} (of {len(odd)}) is not both in the written model and in memory")
    for name, tensor in written.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise OutputError(f"export: {name} is not finite")
        original = memory[name].cpu()
        if tensor.dtype != original.dtype:
            raise OutputError(f"export: {name}: written as {tensor.dtype}, {original.dtype} in memory")
        if tensor.shape != original.shape or not torch.equal(as_bits(tensor), as_bits(original)):
            raise OutputError(f"export: {name}: the written tensor differs from the one in memory")


def _check_logits(reloaded: nn.Module, model: nn.Module, sample_ids: Tensor) -> None:
    device = next(model.parameters()).device
    ids = sample_ids.to(device)
    was_training = model.training
    expected = _logits(model.eval(), ids)
    model.train(was_training)
    if device.type != "cpu":
        model.to("cpu")  # room for the written model
    try:
        found = _logits(reloaded.to(device), ids)
    finally:
        reloaded.to("meta")
        model.to(device)
    if not torch.equal(found, expected):
        worst = (found - expected).abs().max().item()
        raise OutputError(f"export: the written model's logits differ from those in memory, by up to {worst:.3g}")


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (batch, length, vocabulary) on the host. Both models compute from aligned memory: mapped files hold
    tensors at odd addresses, where products may round differently."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return model(ids, use_cache=False).logits.cpu()


def _check_tokenizer(written, tokenizer, sample_ids: Tensor) -> None:
    text = tokenizer.decode(sample_ids.flatten().tolist())
    if written(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise OutputError("export: the written tokenizer gives other tokens than the one in memory")
    if getattr(written, "chat_template", None) != getattr(tokenizer, "chat_template", None):
        raise OutputError("export: the written tokenizer has another chat template")
