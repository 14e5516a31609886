"""What comes of every architecture of transformers, recorded in tests/whole_models/models.json:

python -m tests.helpers.model_table --write [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import warnings
from pathlib import Path

TABLE = Path(__file__).parents[1] / "whole_models" / "models.json"


def read_table() -> dict:
    """``transformers``: the version; ``models``: outcomes of ``whole_models.check_model`` by architecture."""
    return json.loads(TABLE.read_text())


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
        document = {"transformers": transformers.__version__, "models": dict(sorted(models.items()))}
        TABLE.write_text(json.dumps(document, indent=1) + "\n")


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
