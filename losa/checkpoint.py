"""Resuming at round granularity: masks, adapters and replaced weights in safetensors, everything else in JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from losa.errors import OutputError
from losa.files import staged_directory, write_json
from losa.model import wrapped_linears
from losa.modules import MaskedLoRALinear
from losa.recipe import Recipe

logger = logging.getLogger("losa")

KEPT = 2
LAYERS, STATE = "layers.safetensors", "state.json"


def save_checkpoint(directory: Path, model: nn.Module, *, recipe: Recipe, completed_round: int, state: dict) -> None:
    """Write ``directory/round-NN`` whole or not at all and keep the newest two.

    Stored are ``state`` (JSON-able), the recipe, masks and adapters, the weights that a pruner has replaced, and the
    random state of torch, numpy and Python.

    Raises:
        OutputError: disk full, no permission.
    """
    tensors = {}
    for name, layer in wrapped_linears(model).items():
        for part in ("mask", "lora_A", "lora_B", *(["weight"] if layer.weight_replaced else [])):
            tensors[f"{name}.{part}"] = getattr(layer, part).detach().cpu().contiguous()
    document = {
        "recipe": _settings(recipe),
        "completed_round": completed_round,
        "state": state,
        "random": _random_state(tensors),
    }
    with staged_directory(directory / f"round-{completed_round:02d}", overwrite=True) as staged:
        save_file(tensors, staged / LAYERS)
        document["sha256"] = _sha256(staged / LAYERS)
        write_json(staged / STATE, document)
    for old in _rounds(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(directory: Path, model: nn.Module, recipe: Recipe) -> dict | None:
    """Put the newest checkpoint into a freshly wrapped model; its ``state``, or None where there is none.

    A damaged one is passed over, with a warning, for the one before it.

    Raises:
        OutputError: it belongs to another recipe (names the settings) or model, or every one is damaged. The model is
            unchanged then.
    """
    damage = None
    for path in reversed(_rounds(directory)):
        try:
            document, tensors = _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("checkpoint %s: damaged (%s)", path, error)
            damage = damage or f"checkpoint {path}: damaged ({error}), and none before it can be read"
            continue
        _check_recipe(path, document["recipe"], _settings(recipe))
        layers = wrapped_linears(model)
        _check_layers(path, layers, tensors)
        for name, layer in layers.items():
            _restore_layer(layer, name, tensors)
        _set_random_state(document["random"], tensors)
        return document["state"]
    if damage is not None:
        raise OutputError(f"{damage}; --overwrite starts afresh")
    return None


def _rounds(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first; partial ones have another name."""
    found = {int(m[1]): p for p in directory.glob("round-*") if (m := re.fullmatch(r"round-(\d+)", p.name))}
    return [found[number] for number in sorted(found)]


def _settings(recipe: Recipe) -> dict:
    """What a checkpoint belongs to; the output's place does not matter."""
    return recipe.model_dump(mode="json", exclude={"output"})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    document = json.loads((path / STATE).read_text(encoding="utf-8"))
    if _sha256(path / LAYERS) != document["sha256"]:
        raise ValueError(f"{LAYERS} has another checksum than when it was written")
    return document, load_file(path / LAYERS)


def _check_recipe(path: Path, stored: dict, current: dict) -> None:
    before, now = _flat(stored), _flat(current)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        message = f"checkpoint {path}: was written by another recipe ({listed}); put that back, or --overwrite"
        raise OutputError(message)


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_layers(path: Path, layers: dict[str, MaskedLoRALinear], tensors: dict[str, Tensor]) -> None:
    stored = {key.removesuffix(".mask") for key in tensors if key.endswith(".mask")}
    if odd := sorted(stored ^ set(layers)):
        where = "the model" if odd[0] in stored else "the checkpoint"
        raise OutputError(f"checkpoint {path}: belongs to another model; {where} lacks {odd[0]} (of {len(odd)})")
    for name, layer in layers.items():
        rank = len(tensors[f"{name}.lora_A"])
        expected = {
            "mask": layer.mask.shape,
            "lora_A": (rank, layer.in_features),
            "lora_B": (layer.out_features, rank),
            "weight": layer.weight.shape,
        }
        for part, shape in expected.items():
            stored_shape = tuple(tensors[f"{name}.{part}"].shape) if f"{name}.{part}" in tensors else tuple(shape)
            if stored_shape != tuple(shape):
                message = f"belongs to another model; {name}.{part}: expected {tuple(shape)}, found {stored_shape}"
                raise OutputError(f"checkpoint {path}: {message}")


def _restore_layer(layer: MaskedLoRALinear, name: str, tensors: dict[str, Tensor]) -> None:
    device = layer.weight.device
    if f"{name}.weight" in tensors:
        # A copy: the stored tensor lies in the mapped file, unaligned, where matrix products may round differently.
        layer.replace_weight(tensors[f"{name}.weight"].to(device, copy=True))
    layer.set_rank(len(tensors[f"{name}.lora_A"]))
    with torch.no_grad():
        layer.lora_A.copy_(tensors[f"{name}.lora_A"])
        layer.lora_B.copy_(tensors[f"{name}.lora_B"])
    layer.set_mask(tensors[f"{name}.mask"].to(device))


def _random_state(tensors: dict[str, Tensor]) -> dict:
    """Adds the large states to ``tensors`` and returns the rest."""
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    kind, keys, *rest = np.random.get_state()
    tensors["random.numpy"] = torch.from_numpy(keys.astype(np.int64))
    version, words, gauss = random.getstate()
    return {"numpy": [kind, *rest], "python": [version, list(words), gauss]}


def _set_random_state(state: dict, tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    kind, *rest = state["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
