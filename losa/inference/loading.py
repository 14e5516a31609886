"""A checkpoint of any kind, loaded for decoding."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from losa.errors import ModelError
from losa.inference.sparsify import sparsify
from losa.packed.directory import load_any
from losa.storage.kinds import is_packed


def load_sparse(directory: Path, dtype: str, device: str, dense: bool) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a packed or an ordinary checkpoint, packed in memory unless ``dense``.

    Raises:
        ModelError: as ``load_any``, or the model has nothing to pack.
    """
    model, tokenizer = load_any(directory, dtype, device, dense=dense)
    if dense or is_packed(directory):
        return model, tokenizer
    try:
        return sparsify(model), tokenizer
    except ModelError as error:
        raise ModelError(f"{error} (--dense runs it as it is)") from error
