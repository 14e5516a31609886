"""Host memory that is kept between calls: a fresh temporary of megabytes costs more in page faults than its use."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU tensor of this thread, which the next call with this name and dtype overwrites.

    It grows to the largest that was asked for and is never given back: ask for panels, not for whole layers.
    """
    kept: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("kept", {})
    key, count = (name, dtype), math.prod(shape)
    if key not in kept or kept[key].numel() < count:
        # Made in inference mode it could not be written to outside.
        with torch.inference_mode(False):
            kept[key] = torch.empty(count, dtype=dtype, device="cpu")  # whatever the default device is
    return kept[key][:count].view(shape)
