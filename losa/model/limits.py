"""What a model can take in: how many positions it has, and which tokens it knows."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from losa.errors import ModelError

logger = logging.getLogger("losa")

# Some tables of positions have a few rows before the first position (OPT has two).
_SPARE_ROWS = 8
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Positions:
    """How many tokens fit into one sequence.

    ``table``: ``limit`` cannot be exceeded, since positions (or the mask, or the bias of all positions) are looked up
    in a table of that size. Otherwise (rotary, ALiBi, recurrent) the model was made for ``limit`` tokens and also runs
    on longer sequences; None: nothing says how many.
    """

    limit: int | None
    table: bool


def positions(model: nn.Module) -> Positions:
    """The positions of a causal LM, from its configuration and from the shapes of its embeddings and buffers."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None and (limit := getattr(text, "max_seq_len", None)):
        # MPT: each forward pass makes an attention bias of this length, and never a longer one.
        return Positions(limit, True)
    if not isinstance(limit, int) or limit < 1:
        return Positions(None, False)
    embeddings = _embeddings(model)
    for module in _text_model(model, embeddings).modules():
        if module is embeddings:
            continue
        if isinstance(module, nn.Embedding) and limit <= module.num_embeddings <= limit + _SPARE_ROWS:
            # RoBERTa and models made from it count positions from the row after the padding row.
            late = 0 if module.padding_idx is None else module.padding_idx + 1
            return Positions(min(limit, module.num_embeddings - late), True)
        # A table of sinusoids that `make_weights` enlarges for a longer sequence (XGLM) is no limit.
        grows = hasattr(module, "make_weights")
        if not grows and any(_is_table(buffer, limit) for buffer in module.buffers(recurse=False)):
            return Positions(limit, True)
    return Positions(limit, False)


def _embeddings(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # transformers raises it for a model without input embeddings
        return None


def _text_model(model: nn.Module, embeddings: nn.Module | None) -> nn.Module:
    """The innermost model around the input embeddings: an image or audio tower has positions of its own."""
    from transformers import PreTrainedModel

    name = next((name for name, module in model.named_modules() if module is embeddings), "")
    parts = name.split(".")
    around = [model, *(model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))]
    return [model, *(module for module in around if isinstance(module, PreTrainedModel))][-1]


def _is_table(buffer: Tensor, limit: int) -> bool:
    """One vector per position, (limit, width), or a mask of all positions, (..., limit, limit)."""
    rows = buffer.shape[-2] if buffer.ndim >= 2 else 0
    vectors = buffer.ndim == 2 and buffer.is_floating_point()
    return limit <= rows <= limit + _SPARE_ROWS and (vectors or buffer.shape[-1] == rows)


def check_length(model: nn.Module, length: int, what: str) -> None:
    """Refuse sequences longer than the model's table of positions; warn once a model of sequences longer than the model
    was made for. ``what`` names the setting.

    Raises:
        ModelError: the table has fewer than ``length`` positions.
    """
    found = positions(model)
    if found.limit is None or length <= found.limit:
        return
    if found.table:
        raise ModelError(f"{what}: {length} tokens are more than the {found.limit} positions that the model has")
    if model not in _warned:
        _warned.add(model)
        logger.warning("%s: %d tokens are more than the %d positions the model was made for", what, length, found.limit)


def check_ids(model: nn.Module, ids: Tensor, what: str) -> None:
    """Refuse tokens that the model has no embedding for. ``ids``: int64 of any shape; ``what`` names their source.

    Raises:
        ModelError: the largest id is beyond the input embeddings.
    """
    weight = getattr(_embeddings(model), "weight", None)
    if weight is None or not ids.numel():
        return
    largest, rows = int(ids.max()), weight.shape[0]
    if largest >= rows:
        raise ModelError(
            f"{what}: the tokenizer gives token {largest}, but the model has {rows} embeddings; give a model and a "
            "tokenizer that belong together, or enlarge the model by resize_token_embeddings"
        )
