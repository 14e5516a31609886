"""Arguments that many ops take, as plain numbers; what is wrong is a ValueError that names the argument."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

LARGEST = 2**62  # so that what is rounded up to bytes, groups and blocks stays within int64


def integer(name: str, value: Any) -> int:
    """``value`` as an int: Python's, NumPy's or torch's symbolic one; a bool is none."""
    if isinstance(value, torch.SymInt):
        return cast("int", value)
    if type(value) is not int:
        if isinstance(value, bool | np.bool_ | Tensor) or not hasattr(value, "__index__"):
            raise ValueError(f"{name}: expected an integer, got {_told(value)}")
        value = operator.index(value)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected an integer of at most 62 bits, got {_told(value)}")
    return value


def number(name: str, value: Any) -> float:
    """``value`` as a float: any real number that is no bool, or a tensor of one element."""
    if type(value) is float:
        return value
    if type(value) is not int:
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


def tensors(name: str, value: object) -> tuple[Tensor, ...]:
    """``value``, which is a sequence of tensors with strides, or one tensor that is split along its first dimension."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return tensor(name, value).unbind()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: expected a sequence of tensors, got {_told(value)}")
    return tuple(tensor(f"{name}[{index}]", each) for index, each in enumerate(value))


def with_data(name: str, value: Tensor) -> Tensor:
    """``value``, which is not on meta: the op looks at its elements."""
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with data, got one on meta")
    return value


def written_to(name: str, value: Tensor) -> Tensor:
    """``value``, whose elements each have a place of their own."""
    if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{name}: expected memory for every element, got strides {value.stride()}")
    return value


def pattern(keep_n: object, m: object, columns: int) -> tuple[int, int]:
    """keep_n and m as plain ints, for rows of so many columns."""
    keep_n, m = integer("keep_n", keep_n), integer("m", m)
    if not 0 < keep_n <= m:
        raise ValueError(f"keep_n: expected 0 < keep_n <= m, got {keep_n} of {m}")
    if columns % m:
        raise ValueError(f"m: expected a divisor of in_features {columns}, got {m}")
    return keep_n, m


def _told(value: object) -> str:
    """A value of a simple type as it is, unless it is long; of any other value the type."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return f"an integer of {value.bit_length()} bits"
    simple = value is None or isinstance(value, bool | int | float | str | np.generic)
    return f"{value!r:.60}" if simple else type(value).__name__
