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


def save_rows(recipe: Path, directory: Path) -> None:
    """Write calibration.jsonl, train.jsonl and heldout.jsonl, those that the recipe needs. Rows keep their fields."""
    loaded = load_recipe(recipe)
    directory.mkdir(parents=True, exist_ok=True)
    sections = {"calibration": loaded.calibration, "train": loaded.train, "heldout": loaded.evaluate}
    for part, section in sections.items():
        if section is not None:
            sources = section.data if isinstance(section.data, list) else [section.data]
            lines = [json.dumps(row, default=str) + "\n" for source in sources for row in read_rows(source)]
            write_text(directory / f"{part}.jsonl", "".join(lines))


if __name__ == "__main__":
    save_rows(*map(Path, sys.argv[1:]))
