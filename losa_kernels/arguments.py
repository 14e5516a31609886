"""Arguments that many ops take, as plain numbers; what is wrong is a ValueError that names the argument."""

from __future__ import annotations

import operator
from numbers import Real

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**63 - 1  # what native code and torch's sizes hold


def integer(name: str, value: object) -> int:
    """``value`` as an int: Python's, NumPy's or torch's symbolic one, within int64; a bool is none."""
    if isinstance(value, torch.SymInt):
        return value
    if type(value) is not int:
        if isinstance(value, bool | np.bool_ | Tensor) or not hasattr(value, "__index__"):
            raise ValueError(f"{name}: expected an integer, got {_told(value)}")
        value = operator.index(value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {_told(value)}")
    return value


def number(name: str, value: object) -> float:
    """``value`` as a float: any real number that is no bool, or a tensor of one element."""
    if type(value) is float:
        return value
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta
    if not one and (isinstance(value, bool | np.bool_) or not isinstance(value, Real)):
        raise ValueError(f"{name}: expected a number, got {_told(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within a float's range, got {_told(value)}") from None


def tensor(name: str, value: object) -> Tensor:
    """``value``, which is a tensor with strides (not a sparse or an opaque one)."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {_told(value)}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {value.layout}")
    return value


def _told(value: object) -> str:
    """A value of a simple type as it is, unless it is long; of any other value the type."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return f"an integer of {value.bit_length()} bits"
    simple = value is None or isinstance(value, bool | int | float | str | np.generic)
    return f"{value!r:.60}" if simple else type(value).__name__
