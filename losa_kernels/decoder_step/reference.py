"""Plain PyTorch; the ground truth of the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if update is not None:
        x.add_(update)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


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
    keys = cache.shape[1]
    q, k, v = heads.split((len(heads) - 2 * keys, keys, keys))
    q = q if q_norm is None else add_rms_norm(q, None, q_norm, eps)
    k = k if k_norm is None else add_rms_norm(k, None, k_norm, eps)
    cos, sin = cos.index_select(0, position), sin.index_select(0, position)
    q, k = (part * cos + part.roll(part.shape[-1] // 2, -1) * sin for part in (q, k))
    cache.index_copy_(2, position, torch.stack([k, v])[:, :, None])
    return q


def attend_cache(q: Tensor, cache: Tensor, position: Tensor, places: int, scaling: float, finished: Tensor) -> Tensor:
    hidden = torch.arange(places, device=q.device) > position
    # What was never written may be anything, NaN too.
    k, v = cache[:, :, :places].masked_fill(hidden[:, None], 0)
    mask = torch.zeros(places, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    # Queries that share a key head are its rows.
    grouped = q.view(1, k.shape[0], -1, q.shape[1])
    mask = mask.expand(*grouped.shape[:3], -1)
    return F.scaled_dot_product_attention(grouped, k[None], v[None], attn_mask=mask, scale=scaling).reshape(q.shape)


def gated_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
