"""Resuming: what rounds leave (masks, adapters and replaced weights in safetensors, everything else in JSON) and the
results of finished methods. Each belongs to a recipe, a model and data, and is refused for others."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from losa.errors import OutputError
from losa.model.wrapping import wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.sections import Method, Recipe
from losa.record import MethodResult
from losa.run.fingerprint import TRAINING
from losa.storage.files import staged_directory, write_json

logger = logging.getLogger("losa")

KEPT = 2
CHECKPOINTS, LAYERS, STATE = "checkpoints", "layers.safetensors", "state.json"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    *,
    recipe: Recipe,
    completed_round: int,
    state: dict,
    method: Method | None = None,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Write ``directory/round-NN`` whole or not at all and keep the newest two.

    Stored are ``state`` (JSON-able), the recipe, masks and adapters, the weights that a pruner has replaced, and the
    random state of torch, numpy and Python.

    Args:
        method: whose rounds these are; None: the recipe's.
        inputs: digests of model and data (``losa.run.fingerprint``), by what they are of.

    Raises:
        OutputError: disk full, no permission.
    """
    tensors = {}
    for name, layer in wrapped_linears(model).items():
        for part in ("mask", "lora_A", "lora_B", *(["weight"] if layer.weight_replaced else [])):
            tensors[f"{name}.{part}"] = getattr(layer, part).detach().cpu().contiguous()
    document = {
        **_belonging(recipe, method or recipe.method, inputs or {}),
        "completed_round": completed_round,
        "state": state,
        "random": _random_state(tensors),
    }
    with staged_directory(directory / f"round-{completed_round:02d}", force=True) as staged:
        save_file(tensors, staged / LAYERS)
        document["sha256"] = _sha256(staged / LAYERS)
        _write(staged / STATE, document)
    for old in _rounds(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    directory: Path,
    model: nn.Module,
    recipe: Recipe,
    method: Method | None = None,
    inputs: Mapping[str, str] | None = None,
) -> dict | None:
    """Put the newest checkpoint into a freshly wrapped model; its ``state``, or None where there is none.

    A damaged one is passed over, with a warning, for the one before it.

    Raises:
        OutputError: it belongs to another recipe, model or data (names the settings and inputs), or every one is
            damaged. The model is unchanged then.
    """
    wanted = _belonging(recipe, method or recipe.method, inputs or {})
    damage = None
    for path in reversed(_rounds(directory)):
        try:
            document, tensors = _read(path)
        except _DAMAGE as error:
            logger.warning("checkpoint %s: damaged (%s)", path, error)
            damage = damage or f"checkpoint {path}: damaged ({error}), and none before it can be read"
            continue
        _check_belonging(f"checkpoint {path}", document, wanted)
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


def save_result(work: Path, result: MethodResult, recipe: Recipe, inputs: Mapping[str, str]) -> None:
    """Write a finished method's result. Raises OutputError."""
    belonging = _belonging(recipe, result.method, inputs)
    _write(_result_file(work, result.method), {**belonging, "result": vars(result)})


def load_result(work: Path, method: Method, recipe: Recipe, inputs: Mapping[str, str]) -> MethodResult | None:
    """A method's saved result; None where there is none, or a damaged one (with a warning).

    Raises:
        OutputError: it belongs to another recipe, model or data; names the settings and inputs.
    """
    path = _result_file(work, method)
    if not path.exists():
        return None
    try:
        document = _read_document(path)
        found = document["result"]
        if found["method"] != method or set(found) != {field.name for field in fields(MethodResult)}:
            raise ValueError("not this method's result")
    except _DAMAGE as error:
        logger.warning("result %s: damaged (%s); the method runs again", path, error)
        return None
    _check_belonging(f"result {path}", document, _belonging(recipe, method, inputs))
    return MethodResult(**found)


def check_saved(work: Path, recipe: Recipe, methods: Iterable[Method], inputs: Mapping[str, str]) -> None:
    """Find out before any work whether all that would be gone on with belongs to this recipe, model and data.

    Raises:
        OutputError: as ``load_result`` and ``load_checkpoint``.
    """
    for method in methods:
        if method != recipe.method:
            load_result(work, method, recipe, inputs)
        for path in reversed(_rounds(work / method / CHECKPOINTS)):
            try:
                document = _read_document(path / STATE)
            except _DAMAGE:
                continue
            _check_belonging(f"checkpoint {path}", document, _belonging(recipe, method, inputs))
            break


def _result_file(work: Path, method: str) -> Path:
    return work / f"{method}.json"


def _belonging(recipe: Recipe, method: Method, inputs: Mapping[str, str]) -> dict:
    """What a method's rounds and result depend on: not the place of the output, nor what else is compared, nor
    settings that the method does not read or that change no number."""
    left = {"output": True, "method": True, "compare": True, "train": {"tensorboard", "activation_checkpointing"}}
    if method == "losa":
        left["lora"] = {"rank"}
    else:
        left |= {"rounds": True, "allocation": True, "calibration": {"cka_samples"}}
    if method == "prune_only":
        left |= {"train": True, "lora": True}
        inputs = {what: digest for what, digest in inputs.items() if what != TRAINING}
    return {"recipe": recipe.model_dump(mode="json", exclude=left), "inputs": dict(inputs)}


def _write(path: Path, document: dict) -> None:
    write_json(path, {**document, "checksum": _checksum(document)})


def _read_document(path: Path) -> dict:
    """Raises one of ``_DAMAGE``."""
    document = json.loads(path.read_bytes())
    stated = document.pop("checksum")
    if _checksum(document) != stated:
        raise ValueError(f"{path.name} has another checksum than when it was written")
    return document


def _checksum(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    document = _read_document(path / STATE)
    if _sha256(path / LAYERS) != document["sha256"]:
        raise ValueError(f"{LAYERS} has another checksum than when it was written")
    return document, load_file(path / LAYERS)


def _check_belonging(what: str, stored: dict, wanted: dict) -> None:
    before, now = _flat(stored["recipe"]), _flat(wanted["recipe"])
    if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
        listed = ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        raise OutputError(f"{what}: was written by another recipe ({listed}); put that back, or --overwrite")
    if changed := [
        w for w in {**stored["inputs"], **wanted["inputs"]} if stored["inputs"].get(w) != wanted["inputs"].get(w)
    ]:
        listed = " and ".join(changed)
        raise OutputError(f"{what}: the {listed} changed since it was written; put them back, or --overwrite")


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
