"""What several ops ask of a tensor, whatever it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

# Integer dtypes by element size in bytes, to look at any dtype's bits.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """The same elements as integers of their size; a view where ``tensor`` is contiguous."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ops of ``dtype`` compute and add up: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_finite(tensor: Tensor) -> bool:
    """In one pass and without a temporary of the tensor's size: extremes carry nan and inf along."""
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no extremes of floats of 8 bits
    if tensor.dim() > 1 and tensor.mT.is_contiguous():
        tensor = tensor.mT  # of any other order aminmax makes a copy
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
