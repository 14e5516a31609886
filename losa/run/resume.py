"""Results of finished methods, and whether finished work belongs to a run that wants to go on with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import cast

from losa.recipe.methods import MethodName
from losa.recipe.sections import Recipe
from losa.record import MethodResult
from losa.run.documents import DAMAGE, belonging, check_belonging, read_document, write_document
from losa.run.states import CHECKPOINTS, readable_states

logger = logging.getLogger("losa")


def save_result(work: Path, result: MethodResult, recipe: Recipe, inputs: Mapping[str, str]) -> None:
    """Write a finished method's result. Raises OutputError."""
    owner = belonging(recipe, cast(MethodName, result.method), inputs)
    write_document(_result_file(work, result.method), {**owner, "result": vars(result)})


def load_result(work: Path, method: MethodName, recipe: Recipe, inputs: Mapping[str, str]) -> MethodResult | None:
    """A method's saved result; None where there is none, or it is damaged (with a warning).

    Raises:
        OutputError: the result belongs to another recipe, model or data; names the settings and inputs.
    """
    path = _result_file(work, method)
    if not path.exists():
        return None
    try:
        document = read_document(path)
        found = document["result"]
        if found["method"] != method or set(found) != {field.name for field in fields(MethodResult)}:
            raise ValueError("not this method's result")
    except DAMAGE as error:
        logger.warning("result %s: damaged (%s); the method runs again", path, error)
        return None
    check_belonging(f"result {path}", document, belonging(recipe, method, inputs))
    return MethodResult(**found)


def check_saved(work: Path, recipe: Recipe, methods: Iterable[MethodName], inputs: Mapping[str, str]) -> None:
    """Find out before any work whether all saved work belongs to this recipe, model and data.

    Raises:
        OutputError: as ``load_result`` and ``losa.run.states.newest_state``.
    """
    for method in methods:
        if method != recipe.method:
            load_result(work, method, recipe, inputs)
        for state in readable_states(work / method / CHECKPOINTS)[0][:1]:
            check_belonging(f"checkpoint {state.path}", state.document, belonging(recipe, method, inputs))


def _result_file(work: Path, method: str) -> Path:
    return work / f"{method}.json"
