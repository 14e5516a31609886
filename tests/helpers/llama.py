"""LLaMA-2-70B and Llama-3.1-8B without the hub and without weights."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.tools import ROOT, tool

RECIPE = ROOT / "examples/llama2-70b-wanda70.yaml"
_SIZES_OF_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def configuration(directory: Path, model: str = "meta-llama/Llama-2-70b-hf") -> Path:
    """A directory that holds a model's configuration and nothing else: of LLaMA-2-70B the one that
    docs/guide/planning.md shows."""
    directory.mkdir(parents=True, exist_ok=True)
    shown = json.loads(tool("docs_pages").shown_configuration())
    sizes = {"meta-llama/Llama-2-70b-hf": {}, "meta-llama/Llama-3.1-8B": _SIZES_OF_8B}[model]
    (directory / "config.json").write_text(json.dumps(shown | sizes))
    return directory
