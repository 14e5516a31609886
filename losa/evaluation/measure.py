"""What is measured of any causal model, losa's or not: perplexity on a text, and zeros."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from losa.data.tokens import evaluation_tokens
from losa.errors import ModelError
from losa.evaluation.perplexity import Perplexity, perplexity, warn_of_missing_start, window_start
from losa.model.wrapping import sparsity_of, unprunable_of
from losa.recipe.sources import DataSource


@dataclass(frozen=True)
class Zeros:
    """``zeros`` of ``prunable`` weights in the blocks' linears; None where ``reason`` says why they are not counted.
    ``others``: weights in matrices of the blocks that cannot be pruned."""

    zeros: int | None
    prunable: int | None
    reason: str = ""
    others: int = 0

    @property
    def sparsity(self) -> float | None:
        return None if self.zeros is None or not self.prunable else self.zeros / self.prunable

    @property
    def sparsity_of_blocks(self) -> float | None:
        """The share of ``zeros`` in all weights of the blocks' matrices."""
        return None if self.zeros is None or not self.prunable else self.zeros / (self.prunable + self.others)


def count_zeros(model: nn.Module) -> Zeros:
    """Zeros of a model whose blocks are found; a reason for any other model."""
    try:
        zeros, prunable = sparsity_of(model)
    except ModelError as error:
        return Zeros(None, None, str(error).removeprefix("model: "))
    if not prunable:
        return Zeros(None, None, "no linear of its blocks can be pruned")
    return Zeros(zeros, prunable, others=unprunable_of(model))


def text_perplexity(
    model: nn.Module,
    tokenizer,
    source: DataSource,
    *,
    length: int,
    max_windows: int | None,
    batch_size: int,
    bos: bool,
    progress: bool = False,
) -> Perplexity:
    """``perplexity`` on a source of text. Warns where the windows lack a beginning-of-text token that matters.

    Args:
        bos: begin each window with the tokenizer's beginning-of-text token.

    Raises:
        DataError: the source cannot be read, is shorter than a window, or the tokenizer has no such token.
        ModelError, NumericsError: as ``perplexity``.
    """
    tokens = evaluation_tokens(source, tokenizer)
    start = window_start(tokenizer, "--bos") if bos else None
    found = perplexity(model, tokens, length, batch_size, max_windows, progress=progress, bos=start)
    if start is None:
        warn_of_missing_start(model, tokenizer, tokens, length)
    return found
