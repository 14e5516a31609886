"""What a decoder of the LLaMA kind does between its products for one token, one kernel each on a GPU, and one call on a
CPU.

With packed or dense products for qkv, out, gate and up, and down a block is nine launches: ``add_rms_norm``, qkv,
``rotate_and_store``, ``attend_cache``, out, ``add_rms_norm``, gate and up, ``gated_silu``, down. Nothing is read back,
so that a CUDA graph can hold them. For inference: there is no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels import arguments, dispatch


class Operations(NamedTuple):
    """The four functions below, without their checks."""

    add_rms_norm: Callable
    rotate_and_store: Callable
    attend_cache: Callable
    gated_silu: Callable


def operations(device: torch.device) -> Operations:
    """What runs on ``device`` now (``LOSA_BACKEND``), for callers that check their arguments once."""
    return Operations(*(dispatch.implementation(name, device) for name in Operations._fields))


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += update, where there is one; then x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Means are fp32; the sum, the normalised row and its product with the weight are each rounded to x's dtype, as
    transformers rounds (Zhang and Sennrich 2019, RMSNorm).

    Args:
        x: (..., n) floating point, the residual stream; changed in place by an update.
        update: x's shape, dtype and device; or None.
        weight: (n,) of the same dtype and device.

    Returns:
        (..., n) in x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device; names the argument.
        RuntimeError: an argument requires a gradient and gradients are enabled.
    """
    _floating("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected (..., n), got {tuple(x.shape)}")
    if update is not None:
        _like("update", update, x, tuple(x.shape))
    _like("weight", weight, x, tuple(x.shape[-1:]))
    return operations(x.device).add_rms_norm(x, update, weight, eps)


def rotate_and_store(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One token's queries and keys turned by its rotary position (Su et al. 2021), keys and values into the cache.

    x -> x cos + roll(x, size / 2) sin, after an RMS norm of each head where there is one.

    Args:
        heads: (queries + 2 key heads, size): queries, keys, values.
        cos, sin: (places or more, size) of all positions; the first half of sin's columns negated.
        position: int64 (1,), read on the device; one beyond the cache is not stored, and its result undefined.
        cache: (2, key heads, places, size), keys and values; row ``position`` of each is written.
        q_norm, k_norm: (size,), weights of RMS norms of queries and keys; or None.
        eps: of the norms of queries and keys.

    Returns:
        (queries, size), the turned queries.

    Raises:
        ValueError: a wrong shape, dtype or device; names the argument.
        RuntimeError: an argument requires a gradient and gradients are enabled.
    """
    _floating("heads", heads)
    _cache("cache", cache, heads, "heads")
    _, keys, places, size = cache.shape
    if heads.dim() != 2 or size % 2 or heads.shape[0] <= 2 * keys:
        raise ValueError(f"heads: expected (queries + {2 * keys}, even size), got {tuple(heads.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        _like(name, table, heads)
        if table.dim() != 2 or table.shape[0] < places or table.shape[1] != size:
            raise ValueError(f"{name}: expected ({places} or more, {size}), got {tuple(table.shape)}")
    _position(position, heads.device)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            _like(name, norm, heads, (size,))
    return operations(heads.device).rotate_and_store(heads, cos, sin, position, cache, q_norm, k_norm, eps)


def attend_cache(q: Tensor, cache: Tensor, position: Tensor, places: int, scaling: float, finished: Tensor) -> Tensor:
    """softmax(scaling q K^T) V of one token over places 0 to ``position`` of the cache, with an fp32 softmax.

    On a GPU one kernel reads keys and values once for up to four queries that share them (flash-decoding, Dao et al.
    2023); the same arguments give the same bits.

    Args:
        q: (queries, size), a multiple of the key heads; consecutive ones share a key head.
        cache: (2, key heads, room, size), keys and values.
        position: int64 (1,), read on the device.
        places: more than ``position`` (a CPU raises RuntimeError where it is not), at most ``room``; what the launch is
            sized for.
        finished: int32 (queries,) of zeros, and left so; calls that may run at the same time need their own.

    Returns:
        (queries, size) in q's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device; names the argument.
        RuntimeError: an argument requires a gradient and gradients are enabled.
    """
    _floating("q", q)
    _cache("cache", cache, q, "q")
    if q.dim() != 2 or q.shape[0] == 0 or q.shape[0] % cache.shape[1]:
        raise ValueError(f"q: expected (a multiple of {cache.shape[1]}, {cache.shape[3]}), got {tuple(q.shape)}")
    _position(position, q.device)
    places = arguments.integer("places", places)
    if not 0 < places <= cache.shape[2]:
        raise ValueError(f"places: expected 1 to {cache.shape[2]}, got {places}")
    arguments.tensor("finished", finished)
    if finished.dtype != torch.int32 or finished.numel() < len(q) or finished.device != q.device:
        expected = f"int32 ({len(q)},) on {q.device}"
        raise ValueError(f"finished: expected {expected}, got {finished.dtype} {tuple(finished.shape)}")
    return operations(q.device).attend_cache(q, cache, position, places, scaling, finished)


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the gate of a LLaMA MLP (Shazeer 2020, SwiGLU); rounded as torch rounds the two operations.

    Args:
        gate_up: (..., 2 n) floating point: gate, then up.

    Returns:
        (..., n) in its dtype.

    Raises:
        ValueError: an odd last dimension, or no floating point.
        RuntimeError: the argument requires a gradient and gradients are enabled.
    """
    _floating("gate_up", gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected (..., 2 n), got {tuple(gate_up.shape)}")
    return operations(gate_up.device).gated_silu(gate_up)


def _floating(name: str, tensor: Tensor) -> None:
    arguments.tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating point, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        reason = "requires a gradient, but this is for inference only; call it under torch.no_grad()"
        raise RuntimeError(f"{name}: {reason}")


def _like(name: str, tensor: Tensor, first: Tensor, shape: tuple[int, ...] | None = None) -> None:
    _floating(name, tensor)
    if tensor.dtype != first.dtype or tensor.device != first.device:
        raise ValueError(f"{name}: expected {first.dtype} on {first.device}, got {tensor.dtype} on {tensor.device}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")


def _cache(name: str, cache: Tensor, first: Tensor, of: str) -> None:
    _like(name, cache, first)
    size = first.shape[-1] if first.dim() else 0
    if cache.dim() != 4 or cache.shape[0] != 2 or cache.shape[1] == 0 or cache.shape[3] != size:
        raise ValueError(f"{name}: expected (2, key heads, places, {size}) as {of}, got {tuple(cache.shape)}")


def _position(position: Tensor, device: torch.device) -> None:
    arguments.tensor("position", position)
    if position.dtype != torch.int64 or position.numel() != 1 or position.device != device:
        found = f"{position.dtype} {tuple(position.shape)} on {position.device}"
        raise ValueError(f"position: expected int64 (1,) on {device}, got {found}")
