"""Resuming. A finished round leaves a resume state: masks, adapters and replaced weights in safetensors, everything
else in JSON. A finished method leaves its result. Each belongs to a recipe, a model and data, and is refused for any
other."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from losa.errors import OutputError
from losa.model.wrapping import wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.sections import Recipe
from losa.record import MethodResult
from losa.run.fingerprint import TRAINING
from losa.run.random_state import random_state, set_random_state
from losa.storage.files import staged_directory, write_json

logger = logging.getLogger("losa")

KEPT = 2
CHECKPOINTS, LAYERS, STATE = "checkpoints", "layers.safetensors", "state.json"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


def save_resume_state(
    directory: Path,
    model: nn.Module,
    *,
    recipe: Recipe,
    completed_round: int,
    state: dict,
    method: MethodName | None = None,
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
    random_document, random_tensors = random_state()
    document = {
        **_belonging(recipe, method or recipe.method, inputs or {}),
        "completed_round": completed_round,
        "state": state,
        "random": random_document,
    }
    with staged_directory(directory / f"round-{completed_round:02d}", force=True) as staged:
        save_file(tensors | random_tensors, staged / LAYERS)
        document["sha256"] = _sha256(staged / LAYERS)
        _write(staged / STATE, document)
    for old in _rounds(directory)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_resume_state(
    directory: Path,
    model: nn.Module,
    recipe: Recipe,
    method: MethodName | None = None,
    inputs: Mapping[str, str] | None = None,
) -> dict | None:
    """Put the newest resume state into a freshly wrapped model.

    A damaged resume state is passed over, with a warning, for the one before it.

    Returns:
        the ``state`` that was saved with it; None where there is no resume state.

    Raises:
        OutputError: it belongs to another recipe, model or data (names the settings and inputs), or every resume state
            is damaged. The model is unchanged then.
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
        set_random_state(document["random"], tensors)
        return document["state"]
    if damage is not None:
        raise OutputError(f"{damage}; --overwrite starts afresh")
    return None


def _rounds(directory: Path) -> list[Path]:
    """Directories of finished resume states, oldest first. A partial one has another name."""
    found = {int(m[1]): p for p in directory.glob("round-*") if (m := re.fullmatch(r"round-(\d+)", p.name))}
    return [found[number] for number in sorted(found)]


def save_result(work: Path, result: MethodResult, recipe: Recipe, inputs: Mapping[str, str]) -> None:
    """Write a finished method's result. Raises OutputError."""
    belonging = _belonging(recipe, cast(MethodName, result.method), inputs)
    _write(_result_file(work, result.method), {**belonging, "result": vars(result)})


def load_result(work: Path, method: MethodName, recipe: Recipe, inputs: Mapping[str, str]) -> MethodResult | None:
    """A method's saved result; None where there is none, or it is damaged (with a warning).

    Raises:
        OutputError: the result belongs to another recipe, model or data; names the settings and inputs.
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


def check_saved(work: Path, recipe: Recipe, methods: Iterable[MethodName], inputs: Mapping[str, str]) -> None:
    """Find out before any work whether all saved work belongs to this recipe, model and data.

    Raises:
        OutputError: as ``load_result`` and ``load_resume_state``.
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


def _belonging(recipe: Recipe, method: MethodName, inputs: Mapping[str, str]) -> dict:
    """What a method's rounds and result depend on. Left out are the place of the output, the other methods, and
    settings that this method does not read or that change no number."""
    left: dict = dict.fromkeys(("output", "method", "compare", "distributed", "checkpoint"), True)
    left["train"] = {"tensorboard", "activation_checkpointing"}
    if METHODS[method].dynamic:
        left["lora"] = {"rank"}
    else:
        left |= {"rounds": True, "allocation": True, "calibration": {"cka_samples"}}
    if not METHODS[method].trains:
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
    flat: dict = {}
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
