"""Files that say how a model of several modalities takes its images: losa writes what it was given."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger("losa")

FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "audio_tokenizer_config.json"),
)


def fetch_processors(source: str) -> None:
    """Fetch ``FILES`` of a repository on the hub into the hub's cache, while it is asked for the model anyway."""
    for name in FILES:
        _cached(source, name, local_files_only=False)


def copy_processors(tokenizer: Any, directory: Path) -> None:
    """Copy ``FILES`` from where the tokenizer was loaded, those that are there: a directory or the hub's cache.

    Raises:
        OSError: a file cannot be read or written.
    """
    source = getattr(tokenizer, "name_or_path", "")
    for name in FILES if source else ():
        file = Path(source, name) if os.path.isdir(source) else _cached(source, name, local_files_only=True)
        if file is not None and file.is_file():
            shutil.copyfile(file, directory / name)


def _cached(source: str, name: str, local_files_only: bool) -> Path | None:
    """In the hub's cache; None where the repository has no such file, or it cannot be had."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    # A repository may be gone, gated or of a name that it cannot have: the model is written without the file.
    with suppress(Exception):
        found = cached_file(source, name, local_files_only=local_files_only, **quiet)
        return None if found is None else Path(found)
    logger.debug("%s of %s cannot be had", name, source)
    return None
