"""Kernels for sparse low-rank adaptation of LLMs: masked LoRA, CKA, pruning sweeps, sparse packing and linear layers.

Needs torch and numpy only; importable without CUDA, Triton or the compiled extension, in which case every op runs its
plain PyTorch reference. Each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util

__version__ = "0.1.0"

_EXPORTS = {
    "pack_mask": "bitmask",
    "unpack_mask": "bitmask",
    "masked_lora_linear": "masked_lora",
    "merge_masked_lora": "masked_lora",
    "gram": "cka",
    "cka_similarity": "cka",
    "SweepResult": "pruning",
    "sparsegpt_prune": "pruning",
    "wanda_mask": "pruning",
    "pack_bitmask": "packing",
    "pack_nm": "packing",
    "pack_24": "packing",
    "sparse_linear": "sparse_linear",
}

__all__ = [*_EXPORTS, "__version__"]


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
