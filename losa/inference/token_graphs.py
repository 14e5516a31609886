"""Steps of one token as CUDA graphs. A token then costs one launch; without a graph the host takes longer to launch the
kernels of a step than the GPU takes to run them.

Attention is launched for a number of positions of the cache: ``BUCKET``, or ``BUCKET`` doubled several times. A graph
is made for each such number. The first token that needs the number runs without a graph, which loads everything that
must not be loaded in a capture. The second token captures the graph, and later tokens replay it. Token and position
live on the device, where every step leaves those of the next step.

``LOSA_DECODE_GRAPH=0`` turns graphs off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from losa_kernels import settings
from losa_kernels.cuda_graphs import Recorder

logger = logging.getLogger("losa")

BUCKET = 256

# (token (1,), position (1,), places) -> logits (vocabulary,); always the same kernels on the same memory.
Step = Callable[[Tensor, Tensor, int], Tensor]


def places_for(tokens: int) -> int:
    """For how many positions of the cache a step is launched that reads the last of ``tokens`` tokens. They may be more
    than the cache has."""
    places = BUCKET
    while places < tokens:
        places *= 2
    return places


def graphs_for(device: torch.device) -> TokenGraphs | None:
    """Graphs for a device; None: it has none, or ``LOSA_DECODE_GRAPH=0`` turns them off."""
    if device.type != "cuda" or not settings.DECODE_GRAPH():
        return None
    return TokenGraphs(Recorder(device), device)


class TokenGraphs:
    """Runs steps through recordings, one for each number of positions.

    Args:
        recorder: records a function, and frees its recordings; see ``losa_kernels.cuda_graphs.Recorder``.

    ``token`` (1,): the likeliest token after the last step. ``logits`` (vocabulary,): the logits of the last step.
    """

    def __init__(self, recorder, device: torch.device):
        self._recorder = recorder
        with torch.inference_mode(False):
            self.token = torch.zeros(1, dtype=torch.int64, device=device)
            self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits: Any = None  # a tensor from the first step on
        self._next: int | None = 0  # what _position holds; None while a step runs
        self._replays: dict[int, Callable[[], None] | None] = {}
        self._failed = False

    def run(self, step: Step, token: Tensor, length: int) -> bool:
        """Read token (1,), which follows ``length`` tokens. Returns False, with no effect on the decoder, if graphs do
        not work here.

        Args:
            step: the same function in every call.
        """
        if self._failed:
            return False
        if token is not self.token:
            self.token.copy_(token)
        if self._next != length:
            self._position.fill_(length)
        self._next = None
        places = places_for(length + 1)
        try:
            if places not in self._replays:
                self._advance(step, places)
                self._replays[places] = None
            else:
                replay = self._replays[places]
                if replay is None:
                    replay = self._replays[places] = self._recorder(lambda: self._advance(step, places))
                replay()
        except Exception as error:  # after any error the plain loop goes on, or names what is wrong
            logger.warning("generate: no CUDA graph, tokens are read step by step: %s", error)
            self._failed = True
            self.close()
            return False
        self._next = length + 1
        return True

    def _advance(self, step: Step, places: int) -> None:
        logits = step(self.token, self._position, places)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self._position.add_(1)

    def close(self) -> None:
        """Free the recordings' memory."""
        self._replays.clear()
        self._recorder.close()
