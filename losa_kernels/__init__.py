"""Kernels for sparse low-rank adaptation of LLMs: masked LoRA, CKA, pruning sweeps, sparse packing and linear layers.

Needs torch and numpy only; importable without CUDA, Triton or the compiled extension, in which case every op runs its
plain PyTorch reference. Each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from losa_kernels.version import __version__

if TYPE_CHECKING:
    from losa_kernels.bitmask import pack_mask, unpack_mask
    from losa_kernels.cka import cka_similarity, gram
    from losa_kernels.dense_linear import dense_linear
    from losa_kernels.grouped_masked_lora import grouped_masked_lora_linear
    from losa_kernels.masked_lora import masked_lora_linear, merge_masked_lora
    from losa_kernels.packing import pack_24, pack_bitmask, pack_nm
    from losa_kernels.pruning import SweepResult, alps_prune, sparsegpt_prune, wanda_mask
    from losa_kernels.sparse_linear import sparse_linear

_EXPORTS = {
    "pack_mask": "bitmask",
    "unpack_mask": "bitmask",
    "masked_lora_linear": "masked_lora",
    "merge_masked_lora": "masked_lora",
    "grouped_masked_lora_linear": "grouped_masked_lora",
    "gram": "cka",
    "cka_similarity": "cka",
    "SweepResult": "pruning",
    "alps_prune": "pruning",
    "sparsegpt_prune": "pruning",
    "wanda_mask": "pruning",
    "pack_bitmask": "packing",
    "pack_nm": "packing",
    "pack_24": "packing",
    "sparse_linear": "sparse_linear",
    "dense_linear": "dense_linear",
}

__all__ = [
    "SweepResult",
    "__version__",
    "alps_prune",
    "cka_similarity",
    "dense_linear",
    "gram",
    "grouped_masked_lora_linear",
    "masked_lora_linear",
    "merge_masked_lora",
    "pack_24",
    "pack_bitmask",
    "pack_mask",
    "pack_nm",
    "sparse_linear",
    "sparsegpt_prune",
    "unpack_mask",
    "wanda_mask",
]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A function named like its subpackage is bound now: importing the subpackage later would put the module in its place.
for _name, _module in _EXPORTS.items():
    if _name == _module and importlib.util.find_spec(f"{__name__}.{_module}"):
        __getattr__(_name)
