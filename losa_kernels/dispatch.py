"""Which implementation of an op runs: one table, one setting (``LOSA_BACKEND``), one log line per choice.

torch.compile traces :func:`implementation` as well: it makes the choice while it compiles, and the graph keeps it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch

from losa_kernels import native, settings

logger = logging.getLogger("losa_kernels")

ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

TABLE: dict[str, dict[str, str]] = {
    "pack_mask": {
        "reference": "losa_kernels.bitmask:pack_reference",
        "cpu": "losa_kernels.bitmask:pack_native",
        "cuda": "losa_kernels.bitmask:pack_native",
    },
    "unpack_mask": {
        "reference": "losa_kernels.bitmask:unpack_reference",
        "cpu": "losa_kernels.bitmask:unpack_native",
        "cuda": "losa_kernels.bitmask:unpack_native",
    },
    "masked_lora_forward": {
        "reference": "losa_kernels.masked_lora.reference:forward",
        "triton": "losa_kernels.masked_lora.triton:forward",
        "cpu": "losa_kernels.masked_lora.cpu:forward",
    },
    "masked_lora_backward": {
        "reference": "losa_kernels.masked_lora.reference:backward",
        "triton": "losa_kernels.masked_lora.triton:backward",
        "cpu": "losa_kernels.masked_lora.cpu:backward",
    },
    "merge_masked_lora": {
        "reference": "losa_kernels.masked_lora.reference:merge",
        "triton": "losa_kernels.masked_lora.triton:merge",
        "cpu": "losa_kernels.masked_lora.cpu:merge",
    },
    "grouped_masked_lora_forward": {
        "reference": "losa_kernels.grouped_masked_lora.reference:forward",
        "triton": "losa_kernels.grouped_masked_lora.triton:forward",
        "cpu": "losa_kernels.grouped_masked_lora.cpu:forward",
    },
    "grouped_masked_lora_backward": {
        "reference": "losa_kernels.grouped_masked_lora.reference:backward",
        "triton": "losa_kernels.grouped_masked_lora.triton:backward",
        "cpu": "losa_kernels.grouped_masked_lora.cpu:backward",
    },
    "gram": {
        "reference": "losa_kernels.cka.reference:gram",
        "triton": "losa_kernels.cka.triton:gram",
        "cpu": "losa_kernels.cka.cpu:gram",
    },
    "inverse_factors": {
        "reference": "losa_kernels.pruning.reference:inverse_factors",
        "cpu": "losa_kernels.pruning.cpu:inverse_factors",
        "cuda": "losa_kernels.pruning.factor:inverse_factors",
    },
    "column_sweep": {
        "reference": "losa_kernels.pruning.reference:column_sweep",
        "cpu": "losa_kernels.pruning.cpu:column_sweep",
        "cuda": "losa_kernels.pruning.cuda:column_sweep",
    },
    "wanda_mask": {
        "reference": "losa_kernels.pruning.reference:wanda_mask",
        "cpu": "losa_kernels.pruning.cpu:wanda_mask",
        "cuda": "losa_kernels.pruning.cuda:wanda_mask",
    },
    "pack_bitmask": {
        "reference": "losa_kernels.packing.reference:pack_bitmask",
        "cpu": "losa_kernels.packing.native:pack_bitmask",
        "cuda": "losa_kernels.packing.cuda:pack_bitmask",
    },
    "pack_nm": {
        "reference": "losa_kernels.packing.reference:pack_nm",
        "cpu": "losa_kernels.packing.native:pack_nm",
        "cuda": "losa_kernels.packing.cuda:pack_nm",
    },
    "pack_24": {"reference": "losa_kernels.packing.reference:pack_24"},
    "largest_group": {
        "reference": "losa_kernels.packing.reference:largest_group",
        "cpu": "losa_kernels.packing.native:largest_group",
        "cuda": "losa_kernels.packing.cuda:largest_group",
    },
    "unpack_bitmask": {
        "reference": "losa_kernels.packing.reference:unpack_bitmask",
        "cpu": "losa_kernels.packing.native:unpack_bitmask",
        "cuda": "losa_kernels.packing.cuda:unpack_bitmask",
    },
    "unpack_24": {"reference": "losa_kernels.packing.reference:unpack_24"},
    "sparse_linear": {
        "reference": "losa_kernels.sparse_linear.reference:sparse_linear",
        "cpu": "losa_kernels.sparse_linear.cpu:sparse_linear",
        "cuda": "losa_kernels.sparse_linear.cuda:sparse_linear",
    },
    "dense_linear": {
        "reference": "losa_kernels.dense_linear.reference:dense_linear",
        "cpu": "losa_kernels.dense_linear.cpu:dense_linear",
    },
    "add_rms_norm": {
        "reference": "losa_kernels.decoder_step.reference:add_rms_norm",
        "cpu": "losa_kernels.decoder_step.native:add_rms_norm",
        "cuda": "losa_kernels.decoder_step.native:add_rms_norm",
    },
    "rotate_and_store": {
        "reference": "losa_kernels.decoder_step.reference:rotate_and_store",
        "cpu": "losa_kernels.decoder_step.native:rotate_and_store",
        "cuda": "losa_kernels.decoder_step.cuda:rotate_and_store",
    },
    "attend_cache": {
        "reference": "losa_kernels.decoder_step.reference:attend_cache",
        "cpu": "losa_kernels.decoder_step.native:attend_cache",
        "cuda": "losa_kernels.decoder_step.cuda:attend_cache",
    },
    "gated_silu": {
        "reference": "losa_kernels.decoder_step.reference:gated_silu",
        "cpu": "losa_kernels.decoder_step.native:gated_silu",
        "cuda": "losa_kernels.decoder_step.native:gated_silu",
    },
}


# What _first_that_can() has imported, as "OP_on_BACKEND". torch.compile cannot trace an import; it sees an attribute of
# an object that is added while it traces, but not a new key of a dict.
_imported = SimpleNamespace()


def implementation(op: str, device: torch.device | torch.Tensor | str) -> Callable:
    """The callable that runs ``op`` on ``device`` (a device, its name, or a tensor that lies on it).

    CUDA: cuda, triton, reference. CPU: cpu, reference. Any other device: reference. The first backend that has a row
    for the op and can load wins. A backend forced by ``LOSA_BACKEND`` comes first; if it has no row for this op and
    device the order above decides.

    Raises ValueError for an unknown op or a bad ``LOSA_BACKEND``; RuntimeError when the forced backend cannot load.
    """
    return getattr(_imported, _choose(op, _type_of(device), settings.BACKEND()))


def backend(op: str, device: torch.device | torch.Tensor | str) -> str:
    """Which backend :func:`implementation` takes: "reference", "triton", "cuda" or "cpu". The same errors."""
    return _choose(op, _type_of(device), settings.BACKEND()).rpartition("_on_")[2]


def _type_of(device: torch.device | torch.Tensor | str) -> str:
    if isinstance(device, torch.device):
        return device.type
    return device.device.type if isinstance(device, torch.Tensor) else device.partition(":")[0]


# A plain function around the cached one: torch.compile would trace into the cache's.
def _choose(op: str, device_type: str, forced: str) -> str:
    return _first_that_can(op, device_type, forced)


# torch.compiler.assume_constant_result does this too, and imports torch.compile's machinery, which takes as long as to
# import torch.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _first_that_can(op: str, device_type: str, forced: str) -> str:
    if op not in TABLE:
        raise ValueError(f"op: expected one of {', '.join(TABLE)}; got {op!r}")

    order = ORDER.get(device_type, ("reference",))
    if forced != "auto":
        reason = unavailable(forced)
        if reason:
            raise RuntimeError(f"LOSA_BACKEND={forced} cannot be used: {reason}")
        if forced in order or forced == "reference" or (forced == "triton" and interpreted()):
            order = (forced, *(name for name in order if name != forced))

    for name in order:
        target = TABLE[op].get(name)
        if target and not unavailable(name):
            module, _, function = target.partition(":")
            attribute = f"{op}_on_{name}"
            setattr(_imported, attribute, getattr(importlib.import_module(module), function))
            logger.info("%s on %s: %s (%s)", op, device_type, name, target)
            return attribute
    raise RuntimeError(f"{op} has no implementation for device type {device_type!r}")


@cache  # Triton reads it once as well
def interpreted() -> bool:
    """Whether Triton's kernels are interpreted (TRITON_INTERPRET); then they also run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run in this process; None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "the package 'triton' is not installed"
    return native.missing(backend)
