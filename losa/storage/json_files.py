"""JSON files, read with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path

from losa.errors import ModelError, shown_name


def read_json(path: Path) -> object:
    """What a JSON file holds. Raises ModelError that names the file: absent, not JSON, nested too deep, a key twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise ModelError(f"{path}: nested too deep") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from error


def each_key_once(pairs: list[tuple[str, object]]) -> dict:
    """For ``json.loads(object_pairs_hook=...)``: raises ValueError for a key that an object has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown_name(next(key for key in found if keys.count(key) > 1))!r} stands there twice")
    return found
