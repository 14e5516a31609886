"""The layers that every implementation of the grouped masked-LoRA linear takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa_kernels.masked_lora.layer import DIRECT_RANK, Layer

# Of the weights W_eff of groups that a GPU multiplies together, and of their gradients, each.
STACK_BYTES = 4 << 30

Gradients = tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None, list[Tensor] | None]
"""Of x, and of every group's lora_A, lora_B and bias; None where nobody asked for them."""


class Groups(NamedTuple):
    """One layer for each group of rows, all of one shape (out, in); ranks may differ.

    ``weights`` W (out, in); ``masks`` packed uint8 (out, ceil(in / 8)); ``lora_A`` (r, in); ``lora_B`` (out, r), never
    multiplied by s; ``scaling`` s; ``biases`` (out,), or none.
    """

    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scaling: float
    biases: Sequence[Tensor] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of every group."""
        return self.weights[0].shape[0], self.weights[0].shape[1]

    def layer(self, group: int) -> Layer:
        weight, mask, A, B = (each[group] for each in (self.weights, self.masks, self.lora_A, self.lora_B))
        return Layer(weight, mask, A, B, self.scaling)

    def some(self, start: int, stop: int) -> Groups:
        """Groups ``start`` to ``stop`` - 1."""
        lists = (self.weights, self.masks, self.lora_A, self.lora_B, self.biases)
        weights, masks, A, B, biases = (each[start:stop] for each in lists)
        return Groups(weights, masks, A, B, self.scaling, biases)

    def bias(self, group: int) -> Tensor | None:
        return self.biases[group] if self.biases else None

    def factors(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """A and s B of every group in ``dtype``."""
        scaled = torch._foreach_mul([B.to(dtype) for B in self.lora_B], self.scaling)
        return [A.to(dtype) for A in self.lora_A], list(scaled)


def may_multiply_together(dtype: torch.dtype, rank: int, shape: tuple[int, ...]) -> bool:
    """Whether a GPU's grouped GEMM takes rows of ``dtype`` with groups of this rank and shape (out, in)."""
    return dtype == torch.bfloat16 and rank <= DIRECT_RANK and all(n % 8 == 0 for n in shape)


def as_stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """(groups, ...), a view of tensors of one shape that lie at equal distances in one storage, as the experts of a
    stack do; None where they do not."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    if len({(t.untyped_storage()._cdata, t.stride()) for t in tensors}) > 1:
        return None
    places = [t.storage_offset() for t in tensors]
    step = places[1] - places[0]
    if step <= 0 or any(b - a != step for a, b in zip(places, places[1:], strict=False)):
        return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def rows_of_groups(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and its rows."""
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            yield group, slice(start, end)
        start = end
