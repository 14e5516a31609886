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


def random_state() -> tuple[dict, dict[str, Tensor]]:
    """The state of every random generator: the small parts as JSON, the large parts as tensors by name."""
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = legacy
    tensors["random.numpy"] = torch.from_numpy(keys.astype(np.int64))
    version, words, gauss = random.getstate()
    return {"numpy": [kind, *rest], "python": [version, list(words), gauss]}, tensors


def set_random_state(state: dict, tensors: dict[str, Tensor]) -> None:
    """Go on where ``random_state`` was called."""
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    kind, *rest = state["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
