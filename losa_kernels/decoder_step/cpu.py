"""csrc/cpu/decoder_step: one call each. Other dtypes, and tensors with gaps, take the reference."""

from __future__ import annotations

from torch import Tensor

from losa_kernels.decoder_step import operators, reference
from losa_kernels.decoder_step.operators import alike


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    served = alike(x, weight, x if update is None else update)
    return (operators if served else reference).add_rms_norm(x, update, weight, eps)


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
    served = alike(heads, cos, sin, cache, *(norm for norm in (q_norm, k_norm) if norm is not None))
    return (operators if served else reference).rotate_and_store(heads, cos, sin, position, cache, q_norm, k_norm, eps)


def attend_cache(q: Tensor, cache: Tensor, position: Tensor, places: int, scaling: float, finished: Tensor) -> Tensor:
    served = operators if alike(q, cache) else reference
    return served.attend_cache(q, cache, position, places, scaling, finished)


def gated_silu(gate_up: Tensor) -> Tensor:
    return (operators if alike(gate_up) else reference).gated_silu(gate_up)
