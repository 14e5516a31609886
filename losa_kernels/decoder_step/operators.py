"""The native operators of a decode step (csrc/cpu/decoder_step, csrc/cuda/decoder_step), and what they do on meta."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import native

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def alike(first: Tensor, *others: Tensor) -> bool:
    """Whether tensors are contiguous and of one type that the operators have."""
    dtype = first.dtype
    return (
        dtype in _FLOATS
        and first.is_contiguous()
        and all(other.dtype == dtype and other.is_contiguous() for other in others)
    )


if native.missing("cpu") is None:
    # Finding them takes as long as all checks together.
    add_rms_norm, rotate_and_store = torch.ops.losa.add_rms_norm.default, torch.ops.losa.rotate_and_store.default
    attend_cache, gated_silu = torch.ops.losa.attend_cache.default, torch.ops.losa.gated_silu.default

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
