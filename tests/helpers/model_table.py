"""What comes of every architecture of transformers, recorded in tests/whole_models/models.json, and the table of
docs/guide/models.md, which is made of it:

python -m tests.helpers.model_table --write [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import tempfile
import warnings
from pathlib import Path

TABLE = Path(__file__).parents[1] / "whole_models" / "models.json"
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "models.md"
PLACE = re.compile(r"(?<=^<!-- models -->\n).*?(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def read_table() -> dict:
    """``transformers``: the version; ``models``: outcomes of ``whole_models.check_model`` by architecture."""
    return json.loads(TABLE.read_text())


def filled(page: str, recorded: dict) -> str:
    """The page with the table in its place: outcomes, then what refusals say, what stays dense, what has no row."""
    from tests.helpers.architectures import LEFT_OUT

    rows, refusals, dense = [], [], []
    for name, outcomes in recorded["models"].items():
        cells = [f"`{name}`"]
        for column, outcome in outcomes.items():
            _, refused, sentence = outcome.partition("refused: ")
            if refused and sentence not in refusals:
                refusals.append(sentence)
            if column == "share" and "; dense: " in outcome:
                outcome, _, left = outcome.partition("; dense: ")
                dense.append(f"* `{name}`: {left}")
            cells.append(f"no ({refusals.index(sentence) + 1})" if refused else outcome)
        rows.append(cells)
    columns = ["", *next(iter(recorded["models"].values()))]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    said = [f"{number}. `{sentence.replace('`', '')}`" for number, sentence in enumerate(refusals, 1)]
    absent = [f"* {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in LEFT_OUT.items()]
    parts = [
        *(f"Of transformers {recorded['transformers']}:", "\n".join(lines)),
        *("What refusals say:", "\n".join(said)),
        *("What stays dense where the share is below 99 %:", "\n".join(dense)),
        *("No row has what", "\n".join(absent)),
    ]
    return PLACE.sub(lambda _: "\n" + "\n\n".join(parts) + "\n\n", page)


def main() -> None:
    import transformers

    from tests.helpers.architectures import names

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", help="default: all")
    parser.add_argument("--write", action="store_true", help="into models.json; default: print what differs from it")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    recorded = read_table() if TABLE.exists() else {"models": {}}
    models = dict(recorded["models"]) if args.name else {}
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=8) as pool:
        for name, outcomes in pool.imap_unordered(_check, args.name or names()):
            models[name] = outcomes
            was = recorded["models"].get(name)
            print(name, "as recorded" if outcomes == was else json.dumps(outcomes), flush=True)
    if args.write:
        document = {"transformers": transformers.__version__, "models": {name: models[name] for name in names()}}
        TABLE.write_text(json.dumps(document, indent=1) + "\n")
        PAGE.write_text(filled(PAGE.read_text(), document))


def _check(name: str) -> tuple[str, dict[str, str]]:
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    logging.getLogger("losa").setLevel(logging.ERROR)
    import torch
    import transformers

    from tests.helpers.whole_models import check_model

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        return name, check_model(name, Path(folder))


if __name__ == "__main__":
    main()
