"""What must be true of a written model, tensor by tensor, and the records of masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.distributed.turns import by_turns
from losa.errors import OutputError
from losa.model.finite import is_finite
from losa.model.wrapping import wrapped_linears
from losa.record import MaskRecord, RunRecord
from losa_kernels import unpack_mask
from losa_kernels.tensors import as_bits


def mask_records(masks: Mapping[str, Tensor], in_features: Mapping[str, int]) -> dict[str, MaskRecord]:
    """Checksum and counts of packed masks (out, ceil(in/8)), by linear name. Of masks that are held in shards the
    processes work out some each, and all call it together."""

    def record(name: str, mask: Tensor) -> MaskRecord:
        mask = mask.detach().cpu().contiguous()
        kept = unpack_mask(mask, in_features[name])
        digest = hashlib.sha256(mask.numpy().tobytes()).hexdigest()
        return MaskRecord(digest, list(kept.shape), int(kept.sum()))

    if any(isinstance(mask, DTensor) for mask in masks.values()):
        return by_turns(masks, record)
    return {name: record(name, mask) for name, mask in masks.items()}


def some_ids(model: Any) -> Tensor:
    """(1, length) int64 tokens that the model knows."""
    return torch.arange(min(64, model.get_input_embeddings().weight.shape[0]))[None]


def check_merged(model: nn.Module) -> None:
    """Raises ValueError for a model that still has adapters; names the first."""
    if left := list(wrapped_linears(model)):
        raise ValueError(f"model: expected a merged model, found {len(left)} adapters ({left[0]}); merge_model first")


def check_masked_names(record: RunRecord, masks: Mapping[str, Tensor]) -> None:
    """Raises OutputError unless the model's ``masks`` and the record's have the same names."""
    if odd := sorted(set(masks) ^ set(record.masks)):
        raise OutputError(f"export: {odd[0]} (of {len(odd)}) has a mask in the model or in the record, not in both")


def check_masked(name: str, weight: Tensor, mask: Tensor, expected: MaskRecord) -> int:
    """The number of kept weights that are zero in a written linear.

    Args:
        weight: (out, in); ``mask``: packed, (out, ceil(in/8)); both whole.
        expected: the record of the mask.

    Raises:
        OutputError: another shape or mask than in the record, or a pruned weight that is not +0.0.
    """
    if list(weight.shape) != expected.shape:
        raise OutputError(f"export: {name}.weight: shape {list(weight.shape)}, the record says {expected.shape}")
    if (found := mask_records({name: mask}, {name: weight.shape[1]})[name]) != expected:
        raise OutputError(f"export: {name}: the mask keeps {found.kept} weights and is not the record's")
    kept = unpack_mask(mask.cpu(), weight.shape[1]).to(weight.device)
    if wrong := int((as_bits(weight)[~kept] != 0).sum()):
        raise OutputError(f"export: {name}.weight: {wrong} pruned weights are not +0.0")
    return expected.kept - int(torch.count_nonzero(weight))


def check_zeros(record: RunRecord, zeros: int, prunable: int) -> None:
    """Raises OutputError if the blocks' linears have other counts than the record's result, without the weights that
    are gone from the export."""
    result = next((r for r in reversed(record.results) if r.method == record.method), None)
    if result is None:
        return
    gone = 0 if record.shrunk is None else record.shrunk.removed
    if (zeros, prunable) != (expected := (result.zeros - gone, result.prunable - gone)):
        told = f"the record says {expected[0]} of {expected[1]}"
        raise OutputError(f"export: {zeros} of {prunable} weights in blocks are zero, {told}")


def check_same_names(written: Iterable[str], memory: Iterable[str]) -> None:
    """Raises OutputError unless the written model and the one in memory have tensors of the same names."""
    if odd := sorted(set(written) ^ set(memory)):
        raise OutputError(f"export: {odd[0]} (of {len(odd)}) is not both in the written model and in memory")


def check_tensor(name: str, tensor: Tensor, original: Tensor) -> None:
    """Raises OutputError unless a written tensor is finite and equals ``original``, on the same device, to the bit."""
    if tensor.is_floating_point() and not is_finite(tensor):
        raise OutputError(f"export: {name} is not finite")
    if tensor.dtype != original.dtype:
        raise OutputError(f"export: {name}: written as {tensor.dtype}, {original.dtype} in memory")
    if tensor.shape != original.shape or not torch.equal(as_bits(tensor), as_bits(original)):
        raise OutputError(f"export: {name}: the written tensor differs from the one in memory")


def check_logits(found: Tensor, expected: Tensor) -> None:
    """Raises OutputError unless the written model's logits are those of the model in memory, to the bit."""
    if not torch.equal(found, expected):
        worst = (found - expected).abs().max().item()
        raise OutputError(f"export: the written model's logits differ from those in memory, by up to {worst:.3g}")


def check_tokenizer(written, tokenizer, sample_ids: Tensor) -> None:
    """Raises OutputError unless a written tokenizer gives the same tokens and chat template as the one in memory."""
    text = tokenizer.decode(sample_ids.flatten().tolist())
    if written(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise OutputError("export: the written tokenizer gives other tokens than the one in memory")
    if getattr(written, "chat_template", None) != getattr(tokenizer, "chat_template", None):
        raise OutputError("export: the written tokenizer has another chat template")
