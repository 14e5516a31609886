"""Text of a user's own in place of a recipe's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from losa.data.splitting import named_parts, split
from losa.distributed.processes import launched
from losa.errors import DataError, RecipeError

# The sections of a recipe that read text, by the part of the user's text that they get.
SECTIONS = {"calibration": "calibration", "train": "train", "heldout": "evaluate"}


def own_text(recipe: dict, data: Path, output: Path, log: Callable[[str], None]) -> dict:
    """Settings that make ``data`` the text of every section that the recipe has (`--set evaluate=` drops one).

    Args:
        recipe: settings, not validated yet.
        data: a directory with the parts by name; anything else is split into ``OUTPUT.data``.
        log: gets a sentence about the split.

    Returns:
        values by dotted name, for ``losa.recipe.override``.

    Raises:
        RecipeError: a part that a section needs is missing.
        DataError, OutputError: as ``losa.data.splitting``; or several processes would split, each for itself.
    """
    wanted = [part for part, section in SECTIONS.items() if part == "calibration" or recipe.get(section) is not None]
    parts = named_parts(data)
    if not parts:
        if (processes := launched().count) > 1:
            raise DataError(
                f"--data {data}: expected a directory with calibration.*, train.* and heldout.*: {processes} processes "
                "do not split text; a run in one process leaves such a directory, OUTPUT.data"
            )
        parts, message = split(data, output.with_name(f"{output.name}.data"))
        log(message)
    if missing := [part for part in wanted if part not in parts]:
        there = ", ".join(path.name for path in parts.values())
        raise RecipeError(f"--data {data}: {' and '.join(missing)} text is missing (files or directories); has {there}")
    return {f"{SECTIONS[part]}.data": {"path": str(parts[part])} for part in wanted}
