"""Resuming at round granularity: masks, adapters and replaced weights in safetensors, everything else in JSON."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from losa.errors import OutputError
from losa.files import staged_directory, write_json
from losa.model import wrapped_linears
from losa.recipe import Recipe

KEPT = 2


def recipe_hash(recipe: Recipe) -> str:
    """Identifies what a checkpoint belongs to; the output's place does not matter."""
    settings = recipe.model_dump(mode="json", exclude={"output"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def save_checkpoint(directory: Path, model: nn.Module, *, recipe: Recipe, completed_round: int, state: dict) -> None:
    """Write ``directory/round-NN`` whole or not at all and keep the newest two.

    ``state`` is JSON-able. Stored besides: masks and adapters, weights a pruner has replaced, and the random state of
    torch, numpy and Python.
    """
    tensors = {}
    for name, layer in wrapped_linears(model).items():
        for part in ("mask", "lora_A", "lora_B", *(["weight"] if layer.weight_replaced else [])):
            tensors[f"{name}.{part}"] = getattr(layer, part).data.cpu().contiguous()
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state()
    tensors["rng.numpy"] = torch.from_numpy(keys.astype(np.int64))
    version, words, gauss = random.getstate()
    document = {
        "recipe": recipe_hash(recipe),
        "completed_round": completed_round,
        "state": state,
        "numpy": [kind, *rest],
        "python": [version, list(words), gauss],
    }
    directory.mkdir(parents=True, exist_ok=True)
    with staged_directory(directory / f"round-{completed_round:02d}", overwrite=True) as staged:
        save_file(tensors, staged / "layers.safetensors")
        write_json(staged / "state.json", document)
    for old in sorted(directory.glob("round-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(directory: Path, model: nn.Module, recipe: Recipe) -> dict | None:
    """Put the newest checkpoint into a freshly wrapped model; its ``state``, or None where there is none.

    Raises:
        OutputError: it belongs to another recipe or model, or is damaged.
    """
    found = sorted(directory.glob("round-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        document = json.loads((newest / "state.json").read_text())
        tensors = load_file(newest / "layers.safetensors")
    except (OSError, ValueError) as error:
        raise OutputError(f"checkpoint {newest}: damaged ({error})") from error
    if document["recipe"] != recipe_hash(recipe):
        raise OutputError(f"checkpoint {newest}: was written by another recipe; --overwrite starts afresh")
    layers = wrapped_linears(model)
    if missing := [name for name in layers if f"{name}.mask" not in tensors]:
        raise OutputError(f"checkpoint {newest}: lacks {missing[0]} and {len(missing) - 1} more layers of this model")
    for name, layer in layers.items():
        if f"{name}.weight" in tensors:
            layer.replace_weight(tensors[f"{name}.weight"].to(layer.weight.device))
        layer.set_rank(len(tensors[f"{name}.lora_A"]))
        with torch.no_grad():
            layer.lora_A.copy_(tensors[f"{name}.lora_A"])
            layer.lora_B.copy_(tensors[f"{name}.lora_B"])
        layer.set_mask(tensors[f"{name}.mask"].to(layer.mask.device))
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    kind, *rest = document["numpy"]
    np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), *rest))
    version, words, gauss = document["python"]
    random.setstate((version, tuple(words), gauss))
    return document["state"]
