"""csrc/cuda/decoder_step: one kernel each. Dtypes and shapes that it has none for take the reference."""

from __future__ import annotations

from torch import Tensor

from losa_kernels.decoder_step import operators, reference
from losa_kernels.decoder_step.operators import alike

LARGEST_HEAD = 256
ROW_BYTES = 512  # of a head that a warp reads at once


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if not alike(x, weight, x if update is None else update):
        return reference.add_rms_norm(x, update, weight, eps)
    return operators.add_rms_norm(x, update, weight, eps)


def rotate_and_store(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    size = heads.shape[1]
    norms = [norm for norm in (q_norm, k_norm) if norm is not None]
    if size > LARGEST_HEAD or size % 2 or not alike(heads, cos, sin, cache, *norms):
        return reference.rotate_and_store(heads, cos, sin, position, cache, q_norm, k_norm, eps)
    return operators.rotate_and_store(heads, cos, sin, position, cache, q_norm, k_norm, eps)


def attend_cache(q: Tensor, cache: Tensor, position: Tensor, places: int, scaling: float, finished: Tensor) -> Tensor:
    row = q.shape[1] * q.dtype.itemsize
    if row > ROW_BYTES or row % 16 or not alike(q, cache):
        return reference.attend_cache(q, cache, position, places, scaling, finished)
    return operators.attend_cache(q, cache, position, places, scaling, finished)


def gated_silu(gate_up: Tensor) -> Tensor:
    return operators.gated_silu(gate_up) if alike(gate_up) else reference.gated_silu(gate_up)
