"""The recipe that a command line asks for: a file, with what the options change in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from losa.errors import RecipeError

if TYPE_CHECKING:
    from losa.recipe.sections import Recipe


def recipe_from(path: Path, settings: list[str] | None, data: Path | None = None, output: Path | None = None) -> Recipe:
    """The recipe of ``path`` with --output, --data and --set, in this order: the last one counts.

    Raises:
        RecipeError: the file, an option or the recipe that comes of them.
        DataError, OutputError: as ``own_text``.
    """
    from losa.recipe.paths import output_path
    from losa.recipe.reading import override, parse_recipe, read_settings

    recipe, overrides = read_settings(path), parse_settings(settings or [])
    if output is not None:
        recipe["output"] = str(output)
    target = overrides.get("output", recipe.get("output"))
    if data is not None and target:
        from losa.run.own_text import own_text

        try:
            place = output_path(Path(str(target)))
        except ValueError as error:
            raise RecipeError(f"output: {error}") from error
        override(recipe, own_text(recipe | overrides, data, place, log=typer.echo))
    return parse_recipe(override(recipe, overrides), where=str(path))


def parse_settings(settings: list[str]) -> dict:
    """``["prune.sparsity=0.5"]`` -> ``{"prune.sparsity": 0.5}``; values are YAML. Raises RecipeError."""
    import yaml

    from losa.recipe.reading import read_yaml

    overrides = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set {setting!r}: expected key=value, for instance prune.sparsity=0.5")
        try:
            overrides[key] = read_yaml(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is not YAML") from error
    return overrides
