"""Weights that are not finite, found and named before anything is computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from losa.errors import ModelError


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; takes no memory of the tensor's size."""
    if not tensor.numel() or tensor.element_size() == 1 or tensor.device.type == "meta":
        return True  # 8-bit types have no infinity, and torch supports few operations on them
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())


def check_finite(where: str, tensor: Tensor) -> None:
    """Raises ModelError with the place of the first element of a floating-point tensor that is NaN or infinite."""
    if is_finite(tensor):
        return
    wrong = ~tensor.detach().isfinite()
    raise ModelError(
        f"{where} is {_first(tensor, wrong)}; {int(wrong.sum())} of {tensor.numel()} weights are not finite"
    )


def check_rounded(where: str, tensor: Tensor, result: Tensor) -> None:
    """Raises ModelError if a finite ``tensor`` became infinite in the type of ``result``."""
    if is_finite(result):
        return
    wrong = ~result.detach().isfinite()
    kind = str(result.dtype).removeprefix("torch.")
    raise ModelError(
        f"{where} is {_first(tensor, wrong)}, beyond {torch.finfo(result.dtype).max:g}, the largest number of {kind}; "
        "take another dtype"
    )


def rounded(where: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in ``dtype`` (None: as it is); another tensor as it is.

    Raises:
        ModelError: it is not finite, before or after; says ``where``, and which element.
    """
    if not tensor.is_floating_point():
        return tensor
    check_finite(where, tensor)
    if dtype is None or dtype == tensor.dtype:
        return tensor
    result = tensor.to(dtype)
    check_rounded(where, tensor, result)
    return result


def _first(tensor: Tensor, wrong: Tensor) -> str:
    place = wrong.nonzero()[0].tolist()
    names = ("row", "column") if len(place) == 2 else ("index",) * len(place)
    told = ", ".join(f"{name} {index}" for name, index in zip(names, place, strict=True))
    value = tensor.detach()[tuple(place)].item()
    return f"{value:g} at {told}" if place else f"{value:g}"
