"""Text generation: by the lean loop of ``decoding``, or through transformers for models that the loop does not know."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losa.errors import LosaError, NumericsError, reason
from losa.inference.checkpoint_settings import end_tokens, warn_of_ignored
from losa.inference.decoding import Unsupported
from losa.inference.detokenizer import Detokenizer
from losa.inference.sampling import choose
from losa.inference.transformers_loop import through_transformers
from losa.inference.waiting_decoders import keep_decoder, take_decoder
from losa.model.finite import is_finite
from losa.model.limits import check_ids, check_length, positions
from losa.modules.sparse import SparseLinear

logger = logging.getLogger("losa")


@dataclass(frozen=True)
class Generated:
    """A continuation of a prompt.

    Attributes:
        text: what the new tokens add to the text of the prompt.
        tokens: ids of the new tokens.
        prompt_tokens: how many tokens the prompt has.
        prefill_seconds: time of the pass over the prompt, which gives the first new token.
        decode_seconds: time of all further tokens.
        fallback: why transformers' loop ran instead of the lean loop; None: the lean loop ran.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    fallback: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | list[dict],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt. The arguments decide how. Of the checkpoint's generation settings only the end tokens are
    used; a warning names other settings that would change the text (repetition_penalty, suppress_tokens, ...).

    Args:
        model: from ``losa.load`` or transformers. The lean loop serves models of the LLaMA kind. Other models generate
            through ``model.generate``, and ``fallback`` of the result says why.
        tokenizer: of the model.
        prompt: text, or messages ({"role", "content"}) for the tokenizer's chat template.
        max_new_tokens: the most new tokens; fewer if the model's table of positions ends earlier.
        temperature: 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set that has this share of probability.
        seed: of the draws, 0 <= seed < 2^64.
        stop_at_eos: end at the first end token.
        on_text: called with each new piece of text; the pieces make up the result's ``text``.

    Raises:
        LosaError: an empty prompt, settings out of range, or messages that the chat template refuses.
        ModelError: a prompt longer than the model's table of positions, a token without an embedding, or an error in
            the model's own code.
        NumericsError: logits are not finite; names the first weight that is not finite.
    """
    _check_settings(max_new_tokens, temperature, top_p, seed)
    ids = _prompt_ids(tokenizer, prompt)
    check_ids(model, ids, "generate: prompt")
    max_new_tokens = _room(model, len(ids), max_new_tokens)
    warn_of_ignored(model, temperature > 0)
    ids = ids.to(next(model.parameters()).device)
    stops = end_tokens(model, tokenizer) if stop_at_eos else set()
    generator = torch.Generator(ids.device).manual_seed(seed)

    def next_token(logits: Tensor) -> Tensor:
        return choose(logits, temperature, top_p, generator)

    try:
        (looks, decoder), fallback = take_decoder(model, len(ids) + max_new_tokens), None
    except Unsupported as error:
        fallback = str(error).removeprefix("generate: ")
    made = _Continuation(tokenizer, ids.tolist(), on_text)
    if fallback is not None:

        def checked(logits: Tensor) -> Tensor:
            _check_finite(model, logits)
            return next_token(logits)

        through_transformers(model, ids, checked, made.add, max_new_tokens=max_new_tokens, stops=stops)
        return made.result(fallback)
    logits = decoder(ids)
    _check_finite(model, logits)
    last = next_token(logits)
    made.add(int(last))
    while made.tokens[-1] not in stops and len(made.tokens) < max_new_tokens:
        last = next_token(decoder(last)) if temperature else decoder.likeliest(last)
        token = int(last)
        if token < 0:
            break
        made.add(token)
    # Taking the likeliest token does not notice logits that are not finite. Through the cache, the last logits are then
    # not finite either.
    _check_finite(model, decoder.logits)
    keep_decoder(model, looks, decoder)
    return made.result()


class _Continuation:
    """New tokens, their text, and the times at which they came."""

    def __init__(self, tokenizer, prompt: Sequence[int], on_text: Callable[[str], None] | None):
        self.tokens: list[int] = []
        self._prompt, self._on_text = len(prompt), on_text
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._pieces: list[str] = []
        self._start = self._first = self._end = time.perf_counter()

    def add(self, token: int) -> None:
        if not self.tokens:
            self._first = time.perf_counter()
        self.tokens.append(token)
        if self._on_text is not None:
            self._show(self._detokenizer.add(token))
        self._end = time.perf_counter()

    def result(self, fallback: str | None = None) -> Generated:
        if self._on_text is None:  # tokens were not decoded while they came
            self._pieces = [self._detokenizer.add(token) for token in self.tokens]
        self._show(self._detokenizer.finish())
        times = self._first - self._start, self._end - self._first
        return Generated("".join(self._pieces), self.tokens, self._prompt, *times, fallback)

    def _show(self, piece: str) -> None:
        self._pieces.append(piece)
        if piece and self._on_text is not None:
            self._on_text(piece)


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    if not (1 <= max_new_tokens < 2**31 and 0 <= temperature < math.inf and 0 < top_p <= 1):
        raise LosaError(
            "generate: expected max_new_tokens >= 1 (and below 2^31), a finite temperature >= 0 and 0 < top_p <= 1, "
            f"got {max_new_tokens}, {temperature} and {top_p}"
        )
    if not 0 <= seed < 2**64:
        raise LosaError(f"generate: seed: expected 0 <= seed < 2^64, got {seed}")


def _prompt_ids(tokenizer, prompt: str | list[dict]) -> Tensor:
    """(tokens,) int64, at least one."""
    plain = isinstance(prompt, str)
    if isinstance(prompt, str):
        text = prompt
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise LosaError(
                "generate: the tokenizer has no chat template for messages; give the prompt as text (without --chat)"
            )
        try:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise any error
            raise LosaError(
                f"generate: the tokenizer's chat template refuses the messages ({reason(error)})"
            ) from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"{text[error.start]!a} at character {error.start}"
        raise LosaError(f"generate: the prompt is not Unicode text ({wrong} is half of a pair)") from error
    try:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=plain).input_ids[0]
    except Exception as error:  # the package tokenizers raises plain Exceptions
        raise LosaError(f"generate: the tokenizer cannot encode the prompt ({reason(error)})") from error
    if len(ids) == 0:
        raise LosaError("generate: the prompt is empty")
    return ids


def _room(model: nn.Module, prompt: int, max_new_tokens: int) -> int:
    """For how many new tokens the model has positions. The last new token needs no position."""
    check_length(model, prompt, "generate: prompt")
    found = positions(model)
    if not found.table or found.limit is None:
        check_length(model, prompt + max_new_tokens - 1, "generate: prompt and max_new_tokens")
        return max_new_tokens
    room = found.limit + 1 - prompt
    if max_new_tokens <= room:
        return max_new_tokens
    logger.warning(
        "generate: %d new tokens instead of %d: the model has %d positions, %d of them for the prompt",
        *(room, max_new_tokens, found.limit, prompt),
    )
    return room


def _check_finite(model: nn.Module, logits: Tensor) -> None:
    """Raises NumericsError if the largest of logits (vocabulary,) is not finite; names the first weight that is not."""
    if math.isfinite(float(logits.max())):
        return
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weights |= {f"{name}.weight": module.packed.values}
    wrong = next((name for name, weight in weights.items() if not is_finite(weight)), None)
    why = (
        f"{wrong} holds values that are not" if wrong else f"all weights are; {logits.dtype} may be too narrow for them"
    )
    raise NumericsError(f"generate: the model's logits are not finite ({why})")
