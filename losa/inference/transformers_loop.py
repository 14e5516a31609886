"""Generation by transformers, for models that the lean loop does not compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import LosaError, ModelError, reason


def with_settings(model: nn.Module, **settings) -> nn.Module:
    """A second object around the same modules, whose ``generate`` uses these settings and, of the checkpoint's
    settings, the special tokens only.

    ``model.generate`` takes settings that its caller does not give from ``model.generation_config``. The second object
    has a ``generation_config`` of its own, so that several threads can do this at once.
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
        add: called with each new token when it comes.
        stops: tokens that end the text.

    Raises:
        ModelError: the model's own code fails; names the model's class and the cause. Errors of ``choose`` and ``add``
            are raised as they are.
    """
    ours = _Ours(choose, add)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": sorted(stops) or None}
    # One sequence has no padding, but transformers requires a padding token.
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
    """One sentence on an error of a model's own code."""
    told = reason(error).removeprefix(f"{type(error).__name__}: ")
    return f"{command}: {type(model).__name__} fails in transformers ({type(error).__name__}: {told})"


class _Ours:
    """Logits processor and streamer for ``model.generate``."""

    def __init__(self, choose: Callable[[Tensor], Tensor], add: Callable[[int], None]):
        self._choose, self._add = choose, add
        self._prompt = True
        self.error: Exception | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """scores (1, vocabulary) -> (1, vocabulary), -inf but for a 0 at the chosen token."""
        token = self._call(self._choose, scores[0])
        return torch.full_like(scores, float("-inf")).index_fill_(1, token, 0)

    def put(self, tokens: Tensor) -> None:
        if self._prompt:  # the first call gives the whole prompt
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
