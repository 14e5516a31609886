"""Save the rows that a recipe reads as files, for machines without a network:

python examples/save_rows.py examples/llama2-70b-wanda70.yaml /shared/data
losa run examples/llama2-70b-wanda70.yaml --data /shared/data
"""

import json
import sys
from pathlib import Path

from losa.data.sources import read_rows
from losa.recipe.reading import load_recipe
from losa.storage.files import write_text


def as_read(row: dict, source) -> dict:
    """The fields of a row that `losa run --data`, which goes by the fields, reads as the recipe's source does."""
    conversation = "messages" in row or {"instruction", "output"} <= row.keys()
    if source.format == "text" or (source.format == "auto" and not conversation):
        return {"text": row.get(source.text_field)}
    return {name: value for name, value in row.items() if source.format != "alpaca" or name != "messages"}


def save_rows(recipe: Path, directory: Path) -> None:
    """Write calibration.jsonl, train.jsonl and heldout.jsonl, those that the recipe needs."""
    loaded = load_recipe(recipe)
    directory.mkdir(parents=True, exist_ok=True)
    sections = {"calibration": loaded.calibration, "train": loaded.train, "heldout": loaded.evaluate}
    for part, section in sections.items():
        if section is not None:
            sources = section.data if isinstance(section.data, list) else [section.data]
            rows = (as_read(dict(row), source) for source in sources for row in read_rows(source))
            write_text(directory / f"{part}.jsonl", "".join(json.dumps(row, default=str) + "\n" for row in rows))


if __name__ == "__main__":
    save_rows(*map(Path, sys.argv[1:]))
