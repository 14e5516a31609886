"""Generation by transformers, for models that the lean loop does not compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import LosaError, ModelError, reason


def with_settings(model: nn.Module, **settings) -> nn.Module:
    """The same model, whose ``generate`` knows these settings and none of the checkpoint's but its special tokens.

    ``model.generate`` fills what its caller leaves open from ``model.generation_config``, which is therefore another
    one here: of a second object around the same modules, so that two threads can do this at once.
    """
    from transformers import GenerationConfig

    stated = getattr(model, "generation_config", None)
    tokens = {name: getattr(stated, name, None) for name in ("bos_token_id", "decoder_start_token_id")}
    changed: Any = copy.copy(model)
    changed.generation_config = GenerationConfig(**(tokens | settings))
    return changed


def through_transformers(
    model: Any,
    ids: Tensor,
    choose: Callable[[Tensor], Tensor],
    add: Callable[[int], None],
    *,
    max_new_tokens: int,
    stops: set[int],
) -> None:
    """Continue ids (tokens,) by ``model.generate``.

    Args:
        choose: logits (vocabulary,) fp32 -> a token id, (1,).
        add: called with each new token, as it comes.
        stops: tokens that end the text.

    Raises:
        ModelError: the model's own code fails; names its class and the cause. Errors of ``choose`` and ``add`` pass.
    """
    ours = _Ours(choose, add)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": sorted(stops) or None}
    # The padding of one sequence is never read, but transformers asks for it.
    settings["pad_token_id"] = min(stops, default=0)
    mask = torch.ones_like(ids)[None]
    try:
        model = with_settings(model, **settings)
        model.generate(ids[None], attention_mask=mask, logits_processor=[ours], streamer=ours)
    except LosaError:
        raise
    except Exception as error:
        if error is ours.error:
            raise
        raise ModelError(failure("generate", model, error)) from error


def failure(command: str, model: nn.Module, error: Exception) -> str:
    """One sentence on what a model's own code raised."""
    told = reason(error).removeprefix(f"{type(error).__name__}: ")
    return f"{command}: {type(model).__name__} fails in transformers ({type(error).__name__}: {told})"


class _Ours:
    """What ``model.generate`` calls: its processor of logits, and its streamer."""

    def __init__(self, choose: Callable[[Tensor], Tensor], add: Callable[[int], None]):
        self._choose, self._add = choose, add
        self._prompt = True
        self.error: Exception | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores (1, vocabulary) -> the same with one finite entry, at the chosen token."""
        token = self._call(self._choose, scores[0])
        return torch.full_like(scores, float("-inf")).index_fill_(1, token, 0)

    def put(self, tokens: Tensor) -> None:
        if self._prompt:  # comes first, whole
            self._prompt = False
            return
        for token in tokens.flatten().tolist():
            self._call(self._add, token)

    def end(self) -> None:
        pass

    def _call(self, function: Callable, argument):
        try:
            return function(argument)
        except Exception as error:
            self.error = error
            raise
