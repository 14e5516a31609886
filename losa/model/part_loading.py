"""What loading a model part by part takes: the model without weights, and where the files hold its tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losa.distributed.processes import is_main
from losa.distributed.together import together
from losa.errors import ModelError
from losa.model.loading import (
    DTYPES,
    check_complete,
    check_config,
    explain_failure,
    locate_model,
    refuse_other_kinds,
)
from losa.model.naming import Naming
from losa.model.skeleton import empty_model
from losa.storage.tensor_files import TensorFiles, checkpoint_tensors

logger = logging.getLogger("losa")


def locate_files(model: str, gguf_file: str | None, dtype: str, how: str, instead: str) -> str:
    """What ``locate_model`` finds. Raises ModelError for a dtype that is none of ``DTYPES``, and for GGUF files, which
    cannot be ``how``; ``instead``: a setting that would do."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    source, file = locate_model(model, gguf_file)
    if file is not None:
        raise ModelError(
            f"model {model!r}: a GGUF file cannot be {how}; load it in one process, save it by save_pretrained and "
            f"give that directory, or set {instead}"
        )
    return source


def empty_of(model: str, directory: Path, dtype: str, trust_remote_code: bool) -> tuple[nn.Module, object]:
    """The model without weights, and its tokenizer. Raises ModelError as ``load_model``, but for its weights."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    refuse_other_kinds(model, str(directory), None)
    trust = {"trust_remote_code": trust_remote_code}
    try:
        check_config(model, AutoConfig.from_pretrained(directory, **trust))
        tokenizer = AutoTokenizer.from_pretrained(directory, **trust)
        with checkpoint_tensors(directory) as files:
            kinds = [entry.dtype for entry in files.stored.values() if entry.dtype.is_floating_point]
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        empty: Any = empty_model(directory, wanted, kinds[0] if kinds else torch.float32, trust_remote_code)
        if empty.can_generate() and (directory / "generation_config.json").is_file():
            empty.generation_config = GenerationConfig.from_pretrained(directory)
    except ModelError:
        raise
    except Exception as error:  # transformers and its dependencies raise errors of many kinds
        raise ModelError(f"model {model!r}: {explain_failure(str(directory), error)}") from error
    return empty, tokenizer


def names_of(model: str, directory: Path, empty: nn.Module, files: TensorFiles) -> tuple[Naming, set[str]]:
    """Where the files' tensors go, and the names of the model's tensors that they fill. Raises ModelError: a tensor is
    missing or does not fit; names it."""
    try:
        naming = Naming(empty, files.names)
        found = set(naming.filled(files.stored))
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error
    check_complete(model, naming.missing(found))
    return naming, found


def tie(naming: Naming, files: TensorFiles, found: set[str], rows_of: Callable[[int], range]) -> None:
    """Tie weights on meta, as transformers does: stored weights that differ stay apart, whatever the config says.
    A tied weight that is stored twice is left out of ``found`` once. ``rows_of``: which of so many rows this process
    compares."""
    model, stored, dtypes = naming.model, {target: name for name, target in naming.renamed.items()}, naming.dtypes()

    def rows(target: str) -> Tensor:
        return files.get(stored[target], rows_of(files.stored[stored[target]].shape[0])).to(dtypes[target])

    for target, source in list(model.all_tied_weights_keys.items()):
        if not {target, source} <= found & stored.keys():
            continue
        if all(together(lambda: torch.equal(rows(target), rows(source)))):  # noqa: B023
            found.discard(target)
        else:
            del model.all_tied_weights_keys[target]
            if is_main():
                logger.warning("%s and %s are tied by config.json, but the checkpoint holds two: kept", target, source)
    model.tie_weights(missing_keys=naming.expected.keys() - found, recompute_mapping=False)


def put_parameters(model: nn.Module, new: Mapping[int, nn.Parameter]) -> None:
    """Put ``new`` parameters in the places of others, by the other's ``id``: in each place of a tied one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in new:
                module._parameters[name] = new[id(parameter)]
