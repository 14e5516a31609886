"""Products of a masked-LoRA linear on a CPU that cost what the mask keeps, by csrc/cpu/masked_lora/products.cpp.

The vendor's library multiplies all entries, zeros included. With the tokens of a batch side by side in registers, a
pruned entry can be skipped without slowing the kept entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from losa_kernels.scratch import scratch

# At most this share of kept entries, and at least this many tokens, over which listing the entries is spread. Measured:
# 1.8 to 2 times the speed of dense products at 30 % kept, 1.3 to 1.5 at 50 %, with AVX2 as with AVX-512.
MOST_KEPT = 0.6
FEWEST_TOKENS = 64
COUNTED_COLUMNS = 1024  # whose mask one thread counts
TOKENS = 1024  # at a time, at most: their sums stay in cache
ELEMENTS = 1 << 22  # of kept memory for the tokens' layout


def pays(product: torch.dtype, tokens: int, weight: Tensor, mask: Tensor) -> bool:
    """Whether these products run sparse: fp32 ones, of enough tokens, by a mask with enough zeros."""
    if product != torch.float32 or tokens < FEWEST_TOKENS:
        return False
    pruned = torch.ops.losa.pruned_per_block.default(mask, weight.shape[1], COUNTED_COLUMNS)
    return weight.numel() - int(pruned.sum()) <= MOST_KEPT * weight.numel()


def multiply(x: Tensor, weight: Tensor, mask: Tensor, A: Tensor, sB: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (tokens, out) = x W_eff^T + bias, all fp32."""
    bias = None if bias is None else bias.contiguous()
    for part in _parts(len(x), x.shape[1]):
        passes = _split("tokens", x[part])
        torch.ops.losa.multiply_masked_lora.default(passes, weight, mask, A, sB, bias, False, out[part])


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    mask: Tensor,
    A: Tensor,
    sB: Tensor,
    dx: Tensor | None,
    dA: Tensor | None,
    dB: Tensor | None,
) -> None:
    """Fills dx (tokens, in) with dY W_eff, adds sB^T (M * G) to dA and (M * G) A^T to dB, where these are not None.

    All fp32: dy (tokens, out), x (tokens, in), A and dA (r, in), sB and dB (out, r).
    """
    for part in _parts(len(dy), dy.shape[1] + A.shape[1]):
        dy_passes = _split("gradient tokens", dy[part])
        if dx is not None:
            torch.ops.losa.multiply_masked_lora.default(dy_passes, weight, mask, A, sB, None, True, dx[part])
        if dA is not None or dB is not None:
            assert x is not None
            x_passes = _split("tokens", x[part])
            torch.ops.losa.sample_masked_lora.default(dy_passes, x_passes, len(x[part]), mask, A, sB, dA, dB)


def _parts(tokens: int, features: int) -> Iterator[slice]:
    step = max(128, min(TOKENS, ELEMENTS // features // 128 * 128))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _split(name: str, matrix: Tensor) -> Tensor:
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    tokens, features = matrix.shape
    passes = scratch(name, (features * (-(-tokens // 16) * 16),), torch.float32)
    torch.ops.losa.split_tokens.default(matrix, passes)
    return passes
