"""The JSON files of unfinished work: each has a checksum, and says which recipe, model and data it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from losa.errors import OutputError
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.sections import Recipe
from losa.run.fingerprint import TRAINING
from losa.storage.files import write_json

# What reading a damaged file may raise.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def belonging(recipe: Recipe, method: MethodName, inputs: Mapping[str, str]) -> dict:
    """What a method's rounds and result depend on. Left out are the place of the output, the other methods, and
    settings that this method does not read or that change no number.

    Args:
        inputs: digests of model and data (``losa.run.fingerprint``), by what they are of.
    """
    left: dict = dict.fromkeys(("output", "method", "compare", "distributed", "checkpoint", "offload"), True)
    left["prune"] = {"partly"}
    left["calibration"] = {"statistics_gb"}
    left["train"] = {"tensorboard", "activation_checkpointing"}
    left["lora"] = set() if METHODS[method].adapter == "gated" else {"gate_penalty"}
    left["allocation"] = {"apply_to"}
    if METHODS[method].dynamic:
        left["lora"] |= {"rank"}
    elif recipe.rated(method):
        left["rounds"] = True
        left["allocation"] |= {"ranks", "error", "mean_rank", "rank_growth", "rank_min", "rank_max"}
    else:
        left |= {"rounds": True, "allocation": True}
        left["calibration"] |= {"cka_samples"}
    if not METHODS[method].reconstructs:
        left["reconstruct"] = True
    if not METHODS[method].trains:
        left |= {"train": True, "lora": True}
        inputs = {what: digest for what, digest in inputs.items() if what != TRAINING}
    return {"recipe": recipe.model_dump(mode="json", exclude=left), "inputs": dict(inputs)}


def check_belonging(what: str, stored: dict, wanted: dict) -> None:
    """Raises OutputError if a file belongs to something else than ``wanted``; names the settings and inputs.

    Args:
        what: the file, for the message.
        stored: its document.
        wanted: of ``belonging``.
    """
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


def write_document(path: Path, document: dict) -> str:
    """Write JSON with its checksum, which is returned. Raises OutputError."""
    checksum = _checksum(document)
    write_json(path, {**document, "checksum": checksum})
    return checksum


def read_document(path: Path) -> dict:
    """What ``write_document`` wrote, its checksum included. Raises one of ``DAMAGE``."""
    document = json.loads(path.read_bytes())
    if _checksum({key: value for key, value in document.items() if key != "checksum"}) != document["checksum"]:
        raise ValueError(f"{path.name} has another checksum than when it was written")
    return document


def _checksum(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
