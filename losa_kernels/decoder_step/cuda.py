"""Heads that csrc/cuda/decoder_step has no kernel for take the reference."""

from __future__ import annotations

from torch import Tensor

from losa_kernels.decoder_step import native, reference

LARGEST_HEAD = 256
ROW_BYTES = 512  # of a head that a warp reads at once


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
    served = heads.shape[1] <= LARGEST_HEAD and heads.shape[1] % 2 == 0
    return (native if served else reference).rotate_and_store(heads, cos, sin, position, cache, q_norm, k_norm, eps)


def attend_cache(q: Tensor, cache: Tensor, position: Tensor, places: int, scaling: float, finished: Tensor) -> Tensor:
    row = q.shape[1] * q.dtype.itemsize
    served = native if row <= ROW_BYTES and row % 16 == 0 else reference
    return served.attend_cache(q, cache, position, places, scaling, finished)
