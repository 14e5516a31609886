"""The next token, from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """logits (vocabulary,) -> a token id, (1,) int64 on the device of the logits. Nothing waits for the device.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set that has this share of probability.

    Returns:
        the token; -1 where a token is drawn and the largest logit is not finite.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    largest = logits.max().float()
    # fp32 can divide by these temperatures.
    temperature = min(max(temperature, 1e-6), 1e30)
    probability = ((logits.float() - largest) / temperature).softmax(-1)
    # A draw from NaN raises on a CPU, and leaves a GPU unusable.
    finite = largest.isfinite()
    probability = probability.where(finite, 1 / len(logits))
    if top_p < 1:
        ordered, order = probability.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        before[0] = -1  # the likeliest token stays, however small top_p is
        ordered.masked_fill_(before >= top_p, 0)
        token = order[torch.multinomial(ordered, 1, generator=generator)]
    else:
        token = torch.multinomial(probability, 1, generator=generator)
    return token.where(finite, -1)
