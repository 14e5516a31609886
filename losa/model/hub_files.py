"""The files of a model on the Hugging Face hub, fetched once for all processes of a machine."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from losa.distributed.processes import check_agreement
from losa.distributed.turns import everywhere, on_each_machine
from losa.errors import ModelError
from losa.model.loading import explain_failure
from losa.storage.json_files import read_json
from losa.storage.tensor_files import INDEX, WHOLE

# Configurations and tokenizers of every kind; weights in several files come by name.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def local_directory(model: str, source: str, trust_remote_code: bool = False) -> Path:
    """The directory of a model, fetched from the hub if need be. All processes call it.

    Args:
        model: what the user gave, for messages.
        source: what ``losa.model.loading.locate_model`` returned here.

    Raises:
        ModelError, OutputError: in every process, as ``fetch``; or some processes see a directory and others none.
    """
    local = os.path.isdir(source)
    check_agreement(f"model {model!r}", "a directory" if local else "no directory of that name")
    return Path(source) if local else fetch(source, trust_remote_code)


def fetch(name: str, trust_remote_code: bool = False) -> Path:
    """The directory in the hub's cache that holds configuration, tokenizer and safetensors files of a model; with
    ``trust_remote_code`` its Python files too. All processes call it: one of each machine, the one with LOCAL_RANK 0,
    downloads what is not there.

    Raises:
        ModelError: in every process; says what the user can do.
        OutputError: in every process; the machines have different revisions.
    """
    on_each_machine(partial(_snapshot, name, trust_remote_code))
    directory = everywhere(partial(_snapshot, name, trust_remote_code, local_files_only=True))
    check_agreement(f"model {name!r}: revision", directory.name)
    return directory


def _snapshot(name: str, trust_remote_code: bool, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL, WHOLE, *(["*.py"] if trust_remote_code else [])]
    try:
        directory = Path(snapshot_download(name, allow_patterns=patterns, **options))
        if shards := _shards(directory):
            # The revision of the small files, and in the same directory.
            snapshot_download(name, revision=directory.name, allow_patterns=shards, **options)
    except ModelError:
        raise
    except Exception as error:  # huggingface_hub and its dependencies raise errors of many kinds
        raise ModelError(f"model {name!r}: {explain_failure(name, error)}") from error
    return directory


def _shards(directory: Path) -> list[str]:
    """The files that the index names; none where ``checkpoint_tensors`` takes one file."""
    if (directory / WHOLE).is_file() or not (directory / INDEX).is_file():
        return []
    index = read_json(directory / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    return sorted({str(file) for file in places.values()}) if isinstance(places, dict) else []
