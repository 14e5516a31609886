"""LoSA: dynamic low-rank sparse adaptation of Hugging Face language models."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Resolved on first use: `import losa` loads neither torch nor transformers.
_LAZY = {
    "MaskedLoRALinear": "losa.modules",
    "wrap_model": "losa.model",
    "merge_model": "losa.model",
    "SparseLinear": "losa.modules",
    "sparsify": "losa.inference.sparsify",
    "load": "losa.packed.directory",
    "generate": "losa.inference.generation",
    "load_recipe": "losa.recipe",
    "run_recipe": "losa.run",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
