"""Grouped masked-LoRA linear on a CPU: one operator for the sparse products of all groups where they pay; else group by
group, as masked_lora/cpu.py computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_kernels.grouped_masked_lora import one_by_one
from losa_kernels.grouped_masked_lora.groups import Gradients, Groups, rows_of_groups
from losa_kernels.masked_lora import cpu, cpu_sparse


def forward(x: Tensor, ends: Tensor, groups: Groups) -> Tensor:
    """Of ``one_by_one.forward``."""
    places = ends.tolist()
    if not _sparse(x.dtype, places, groups):
        return one_by_one.forward(cpu.forward, x, ends, groups)
    y = x.new_empty(len(x), groups.shape[0])
    y[places[-1] :] = 0
    A, sB = groups.factors(torch.float32)
    biases = [bias.float() for bias in groups.biases]
    cpu_sparse.multiply(x, places, groups.weights, groups.masks, A, sB, biases, y)
    return y


def backward(grad_y: Tensor, x: Tensor | None, ends: Tensor, groups: Groups, needs: list[bool]) -> Gradients:
    """Of ``one_by_one.backward``."""
    places = ends.tolist()
    if not _sparse(grad_y.dtype, places, groups):
        return one_by_one.backward(cpu.backward, grad_y, x, ends, groups, needs)
    needs_x, needs_A, needs_B, needs_bias = needs
    dx = grad_y.new_empty(len(grad_y), groups.shape[1]) if needs_x else None
    if dx is not None:
        dx[places[-1] :] = 0
    A, sB = groups.factors(torch.float32)
    # Dense, whatever the factors' strides are.
    dA = [each.new_zeros(each.shape) for each in A] if needs_A else []
    dB = [each.new_zeros(each.shape) for each in sB] if needs_B else []
    if needs_x or needs_A or needs_B:
        cpu_sparse.backward(grad_y, x, places, groups.weights, groups.masks, A, sB, dx, dA, dB)
    if dB:
        torch._foreach_mul_(dB, groups.scaling)
    d_bias = _sums(grad_y, places) if needs_bias else None
    own_A = [gradient.to(A.dtype) for gradient, A in zip(dA, groups.lora_A, strict=False)]
    own_B = [gradient.to(B.dtype) for gradient, B in zip(dB, groups.lora_B, strict=False)]
    return dx, own_A or None, own_B or None, d_bias


def _sparse(dtype: torch.dtype, places: Sequence[int], groups: Groups) -> bool:
    """Whether the sparse products of all groups are taken, for rows of ``dtype``."""
    if dtype != groups.weights[0].dtype:
        return False
    masks = [groups.masks[group] for group, _ in rows_of_groups(places)]
    fewest = cpu_sparse.FEWEST_OF_A_GROUP * len(masks)
    return cpu_sparse.pays(dtype, places[-1], groups.shape[1], masks, fewest)


def _sums(grad_y: Tensor, places: Sequence[int]) -> list[Tensor]:
    sums = [grad_y.new_zeros(grad_y.shape[1], dtype=torch.float32) for _ in places]
    for group, rows in rows_of_groups(places):
        sums[group] = grad_y[rows].sum(0, dtype=torch.float32)
    return sums
