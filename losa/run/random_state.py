"""Random generators of torch, numpy and Python: seeded, and their states for resuming."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The state of every random generator of this process, as JSON."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = legacy
    version, words, gauss = random.getstate()
    state = {
        "torch": _to_text(torch.get_rng_state()),
        "numpy": [kind, keys.astype("<u4").tobytes().hex(), *rest],
        "python": [version, list(words), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict) -> None:
    """Go on where ``random_state`` was called."""
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(bytes.fromhex(keys), "<u4"), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _to_text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
