"""Groups one after another, each by an implementation of the masked-LoRA linear. The host reads where groups end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from losa_kernels.grouped_masked_lora.groups import Gradients, Groups, rows_of_groups
from losa_kernels.tensors import wide_dtype


def forward(single: Callable, x: Tensor, ends: Tensor, groups: Groups) -> Tensor:
    """y (rows, out) in x's dtype; 0 in rows of no group.

    Args:
        single: a ``masked_lora_forward``.
    """
    y = x.new_zeros(len(x), groups.shape[0])
    for group, rows in rows_of_groups(ends.tolist()):
        y[rows] = single(x[rows], groups.layer(group), groups.bias(group), 0.0, 0)
    return y


def backward(
    single: Callable, grad_y: Tensor, x: Tensor | None, ends: Tensor, groups: Groups, needs: list[bool]
) -> Gradients:
    """Gradients of x, lora_A and lora_B in their dtypes, and of biases in ``wide_dtype`` of the weights'.

    ``needs`` says which of the four are wanted; the remaining ones are None. A group without rows has zeros.

    Args:
        single: a ``masked_lora_backward``.
    """
    needs_x, needs_A, needs_B, needs_bias = needs
    dx = grad_y.new_zeros(len(grad_y), groups.shape[1]) if needs_x else None
    dA = list(map(torch.zeros_like, groups.lora_A)) if needs_A else None
    dB = list(map(torch.zeros_like, groups.lora_B)) if needs_B else None
    wide = wide_dtype(groups.weights[0].dtype)
    d_bias = [grad_y.new_zeros(groups.shape[0], dtype=wide) for _ in groups.weights] if needs_bias else None
    for group, rows in rows_of_groups(ends.tolist()):
        own = None if x is None else x[rows]
        found = single(grad_y[rows], own, groups.layer(group), 0.0, 0, needs)
        if dx is not None:
            dx[rows] = found[0]
        for gradients, gradient in zip((dA, dB, d_bias), found[1:], strict=True):
            if gradients is not None:
                gradients[group] = gradient
    return dx, dA, dB, d_bias
