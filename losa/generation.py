"""Text generation: by the lean loop (``losa.decoding``), or through transformers for models that it does not know."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from losa.decoding import LeanDecoder, Unsupported, hooked
from losa.errors import LosaError


@dataclass(frozen=True)
class Generated:
    """``tokens``: new token ids. ``decode_seconds``: of all new tokens but the first, which the prompt's pass gives."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else 0.0


# Decoders wait here between two texts, without a cache, each with what its model looked like. They refer to parts of
# the model, never to the model, which would otherwise live for ever.
_waiting: WeakKeyDictionary[nn.Module, tuple[list, LeanDecoder]] = WeakKeyDictionary()


def _take_decoder(model: nn.Module, max_length: int) -> tuple[list | None, LeanDecoder]:
    """(what the model looks like, its decoder): the one that waits if nothing has changed since, else a new one.

    Taken out, so that two threads never share a cache.
    """
    now = _looks(model)
    before, decoder = _waiting.pop(model, (None, None))
    if decoder is None or before != now:
        return now, LeanDecoder(model, max_length)
    decoder.resize(max_length)
    return now, decoder


def _keep_decoder(model: nn.Module, looks: list | None, decoder: LeanDecoder) -> None:
    if looks is not None:
        decoder.resize(0)
        _waiting[model] = looks, decoder


def forget_decoder(model: nn.Module) -> None:
    """Let go of the linears that a waiting decoder holds on to, before they are replaced."""
    _waiting.pop(model, None)


def _looks(model: nn.Module) -> list | None:
    """What a decoder depends on: which modules there are and where their tensors lie. None: that cannot be told."""
    if hooked(model):
        return None
    seen: list = []
    for name, module in model.named_modules():
        seen += name, ref(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen.append((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device))
    return seen


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer,
    prompt: str | list[dict],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue a prompt.

    Args:
        model, tokenizer: of ``losa.load`` or of transformers; the lean loop serves models of the LLaMA kind, others go
            through ``model.generate``.
        prompt: text, or messages ({"role", "content"}) for the tokenizer's chat template.
        temperature: 0 takes the likeliest token.
        top_p: draws from the smallest set of tokens with this share of probability.
        on_text: called with each new piece of text (lean loop only).

    Raises:
        LosaError: an empty prompt, or settings out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise LosaError(
            "generate: expected max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1, got "
            f"{max_new_tokens}, {temperature} and {top_p}"
        )
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) == 0:
        raise LosaError("generate: the prompt is empty")
    ids = ids.to(model.get_input_embeddings().weight.device)
    stops = _end_tokens(model, tokenizer) if stop_at_eos else set()
    try:
        looks, decoder = _take_decoder(model, len(ids) + max_new_tokens)
    except Unsupported:
        return _through_transformers(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stops)
    generator = torch.Generator(ids.device).manual_seed(seed)
    start = time.perf_counter()
    last = choose(decoder(ids), temperature, top_p, generator)
    token = int(last)
    first = time.perf_counter()
    tokens, shown = [token], 0
    while True:
        if on_text is not None:
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half of a character
                on_text(text[shown:])
                shown = len(text)
        if token in stops or len(tokens) == max_new_tokens:
            break
        last = choose(decoder(last), temperature, top_p, generator) if temperature else decoder.likeliest(last)
        token = int(last)
        tokens.append(token)
    end = time.perf_counter()
    _keep_decoder(model, looks, decoder)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generated(text, tokens, len(ids), first - start, end - first)


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """logits (vocabulary,) -> a token id, (1,) int64 on their device."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probability = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probability.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        return order[torch.multinomial(ordered, 1, generator=generator)]
    return torch.multinomial(probability, 1, generator=generator)


def _end_tokens(model: nn.Module, tokenizer) -> set[int]:
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    return {token for token in (*stated, tokenizer.eos_token_id) if token is not None}


def _through_transformers(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed, stops) -> Generated:
    torch.manual_seed(seed)
    options: dict = {"do_sample": temperature > 0, "eos_token_id": sorted(stops) or None}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    start = time.perf_counter()
    output = model.generate(ids[None], max_new_tokens=max_new_tokens, **options)[0]
    tokens = output[len(ids) :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Generated(text, tokens, len(ids), 0.0, time.perf_counter() - start)
