"""Products of masked-LoRA linears on a CPU that cost what the masks keep, by csrc/cpu/masked_lora/products.cpp.

The vendor's library multiplies all entries, zeros included. With the tokens of a batch side by side in registers, a
pruned entry can be skipped without slowing the kept entries. Rows come in groups with a layer each; ``ends`` has the
row where each group ends, and the first begins at row 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# At most this share of kept entries, and at least this many tokens, over which listing the entries is spread. Measured:
# 1.8 to 2 times the speed of dense products at 30 % kept, 1.3 to 1.5 at 50 %, with AVX2 as with AVX-512.
MOST_KEPT = 0.6
FEWEST_TOKENS = 64
# Of groups with one call for all: a dense product of so few tokens costs as much, and a call of its own.
FEWEST_OF_A_GROUP = 16


def pays(product: torch.dtype, tokens: int, in_features: int, masks: Sequence[Tensor], fewest: int) -> bool:
    """Whether these products run sparse: fp32 ones, of at least ``fewest`` tokens, by masks with enough zeros."""
    if product != torch.float32 or tokens < fewest or not masks:
        return False
    return torch.ops.losa.kept_share.default(masks, in_features) <= MOST_KEPT


def multiply(
    x: Tensor,
    ends: Sequence[int],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    A: Sequence[Tensor],
    sB: Sequence[Tensor],
    biases: Sequence[Tensor],
    out: Tensor,
) -> None:
    """out (tokens, out) = x W_eff^T + bias, all fp32; without biases the sequence is empty."""
    biases = [bias.contiguous() for bias in biases]
    torch.ops.losa.multiply_masked_lora.default(_dense_rows(x), ends, weights, masks, A, sB, biases, out)


def backward(
    dy: Tensor,
    x: Tensor | None,
    ends: Sequence[int],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    A: Sequence[Tensor],
    sB: Sequence[Tensor],
    dx: Tensor | None,
    dA: Sequence[Tensor],
    dB: Sequence[Tensor],
) -> None:
    """Fills dx (tokens, in) with dY W_eff, adds sB^T (M * G) to dA and (M * G) A^T to dB, where these are not None or
    empty.

    All fp32: dy (tokens, out), x (tokens, in), A and dA (r, in), sB and dB (out, r).
    """
    x = None if x is None else _dense_rows(x)
    torch.ops.losa.differentiate_masked_lora.default(_dense_rows(dy), x, ends, weights, masks, A, sB, dx, dA, dB)


def _dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()
