"""LoSA: dynamic low-rank sparse adaptation of Hugging Face language models."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from losa.inference.generation import generate
    from losa.inference.sparsify import sparsify
    from losa.model import merge_model, wrap_model
    from losa.modules import MaskedLoRALinear, SparseLinear
    from losa.packed.directory import load
    from losa.recipe import load_recipe
    from losa.run import run_recipe

    __version__: str

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

__all__ = [
    "MaskedLoRALinear",
    "SparseLinear",
    "__version__",
    "generate",
    "load",
    "load_recipe",
    "merge_model",
    "run_recipe",
    "sparsify",
    "wrap_model",
]


def __getattr__(name: str):
    if name == "__version__":
        value = _version()
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def _version() -> str:
    """What losa_kernels/version.py says. The file is run and not imported: importing losa_kernels would load torch."""
    spec = importlib.util.find_spec("losa_kernels")
    if spec is None or spec.origin is None:
        raise ImportError("losa needs the package losa_kernels, which is not installed")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"]
