"""Files that say how a model of several modalities takes its images: losa writes what it was given."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def copy_processors(model: Any, tokenizer: Any, directory: Path) -> None:
    """Copy ``FILES`` from where the tokenizer was loaded, those that are there, if the model has another half than its
    text half.

    Raises:
        OSError: a file cannot be read or written.
    """
    config, source = model.config, getattr(tokenizer, "name_or_path", "")
    if config.get_text_config() is config or not source:
        return
    for name in FILES:
        file = Path(source, name) if os.path.isdir(source) else _on_the_hub(source, name)
        if file is not None and file.is_file():
            shutil.copyfile(file, directory / name)


def _on_the_hub(source: str, name: str) -> Path | None:
    """In the hub's cache, fetched if need be; None where the repository has no such file."""
    from transformers.utils import cached_file

    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
