"""csrc/cpu/decoder_step and csrc/cuda/decoder_step: one kernel each. Other dtypes, and tensors with gaps, take the
reference."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.decoder_step import reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    served = _alike(x, weight, x if update is None else update)
    return (_add_rms_norm if served else reference.add_rms_norm)(x, update, weight, eps)


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
    served = _alike(heads, cos, sin, cache, *(norm for norm in (q_norm, k_norm) if norm is not None))
    return (_rotate_and_store if served else reference.rotate_and_store)(
        heads, cos, sin, position, cache, q_norm, k_norm, eps
    )


def attend_cache(q: Tensor, cache: Tensor, position: Tensor, places: int, scaling: float, finished: Tensor) -> Tensor:
    served = _alike(q, cache)
    return (_attend_cache if served else reference.attend_cache)(q, cache, position, places, scaling, finished)


def gated_silu(gate_up: Tensor) -> Tensor:
    return (_gated_silu if _alike(gate_up) else reference.gated_silu)(gate_up)


def _alike(first: Tensor, *others: Tensor) -> bool:
    """Whether tensors are contiguous and of one type that the operators have."""
    dtype = first.dtype
    return (
        dtype in _FLOATS
        and first.is_contiguous()
        and all(other.dtype == dtype and other.is_contiguous() for other in others)
    )


if native.missing("cpu") is None:
    # Finding them takes as long as all checks together.
    _add_rms_norm, _rotate_and_store = torch.ops.losa.add_rms_norm.default, torch.ops.losa.rotate_and_store.default
    _attend_cache, _gated_silu = torch.ops.losa.attend_cache.default, torch.ops.losa.gated_silu.default

    @torch.library.register_fake("losa::add_rms_norm")
    def _(x, update, weight, eps):
        return torch.empty_like(x)

    @torch.library.register_fake("losa::rotate_and_store")
    def _(heads, cos, sin, position, cache, q_norm, k_norm, eps):
        return heads.new_empty(heads.shape[0] - 2 * cache.shape[1], heads.shape[1])

    @torch.library.register_fake("losa::attend_cache")
    def _(q, cache, position, places, scaling, finished):
        return torch.empty_like(q)

    @torch.library.register_fake("losa::gated_silu")
    def _(gate_up):
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
