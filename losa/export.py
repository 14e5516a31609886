"""The merged model as an ordinary Hugging Face directory, checked before it gets its name."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from losa.errors import OutputError
from losa.figures import write_figures
from losa.files import staged_directory, write_json, write_text
from losa.record import MaskRecord, RunRecord
from losa.report import model_card
from losa_kernels import unpack_mask

RECORD = "losa_config.json"


def mask_records(masks: Mapping[str, Tensor], in_features: Mapping[str, int]) -> dict[str, MaskRecord]:
    """Checksum and counts of packed masks, by linear name."""
    records = {}
    for name, mask in masks.items():
        kept = unpack_mask(mask, in_features[name])
        digest = hashlib.sha256(mask.contiguous().numpy().tobytes()).hexdigest()
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
    sample_ids: Tensor,
    extra_files: Mapping[str, Path] | None = None,
) -> None:
    """Write safetensors, config, tokenizer, generation config, model card, ``losa_config.json`` and figures.

    Args:
        model: merged, plain linears only.
        masks: packed mask of every pruned linear: the plan the zeros are checked against.
        sample_ids: (batch, length) tokens for the logits check.
        extra_files: copied in under the given names.

    Raises:
        OutputError: cannot be written, or the written model is not the one in memory; ``output`` then does not exist.
    """
    with staged_directory(output, overwrite) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_json(staged / RECORD, record.to_dict())
        write_text(staged / "README.md", model_card(record))
        write_figures(record, staged / "figures")
        for name, source in (extra_files or {}).items():
            shutil.copyfile(source, staged / name)
        check_zeros(staged, masks, record)
        _check_logits(staged, model, sample_ids)


def check_zeros(directory: Path, masks: Mapping[str, Tensor], record: RunRecord) -> None:
    """Every pruned weight is +0.0 to the bit, everything is finite, counts are the record's. Raises OutputError."""
    left = set(masks)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                name = key.removesuffix(".weight")
                tensor = tensors.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise OutputError(f"export: {key} is not finite")
                if name not in left:
                    continue
                left.remove(name)
                kept = unpack_mask(masks[name], tensor.shape[1])
                if int(kept.sum()) != record.masks[name].kept:
                    raise OutputError(
                        f"export: {key}: mask keeps {int(kept.sum())}, record says {record.masks[name].kept}"
                    )
                bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
                wrong = int((bits[~kept] != 0).sum())
                if wrong:
                    raise OutputError(f"export: {key}: {wrong} pruned weights are not +0.0")
    if left:
        raise OutputError(f"export: {sorted(left)[0]} and {len(left) - 1} more pruned linears were not written")


@torch.no_grad()
def _check_logits(directory: Path, model: nn.Module, sample_ids: Tensor) -> None:
    parameter = next(model.parameters())
    try:
        reloaded = type(model).from_pretrained(directory, dtype=parameter.dtype).to(parameter.device).eval()
    except Exception as error:  # transformers raises errors of many kinds
        raise OutputError(f"export: the written model cannot be loaded: {error}") from error
    model.eval()
    ids = sample_ids.to(parameter.device)
    if not torch.equal(reloaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits):
        raise OutputError("export: the written model's logits differ from the model's in memory")
