"""Modules whose parameters are not in memory, and come while somebody needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

_KEY = "_losa_offloaded"  # of a module


@dataclass
class _Offloaded:
    """``device``: on which the module computes. ``users``: how many contexts hold its parameters now."""

    device: torch.device
    load: Callable[[], None]
    release: Callable[[], None]
    users: int = 0


def offload(module: nn.Module, device: torch.device, load: Callable[[], None], release: Callable[[], None]) -> None:
    """Leave a module's parameters, which are on meta, out of memory but within ``onloaded``.

    Args:
        device: on which the module computes.
        load: puts the parameters there.
        release: puts parameters on meta in their place.
    """
    vars(module)[_KEY] = _Offloaded(device, load, release)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within the context an offloaded module has its parameters. It does nothing to any other module, nor to offloaded
    modules inside of it."""
    found = _found(module)
    if found is None:
        yield
        return
    found.users += 1
    try:
        if found.users == 1:
            found.load()
        yield
    finally:
        found.users -= 1
        if not found.users:
            found.release()


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module, or one inside of it, is offloaded."""
    return offloaded_from(module) is not None


def offloaded_from(module: nn.Module) -> torch.device | None:
    """The device of the first offloaded module in a module; None where none is offloaded."""
    return next((found.device for each in module.modules() if (found := _found(each)) is not None), None)


def _found(module: nn.Module) -> _Offloaded | None:
    return vars(module).get(_KEY)
