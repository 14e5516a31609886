"""Grouped masked-LoRA linear in plain PyTorch: the reference of each group in turn. Ground truth of the fast
implementations."""

from __future__ import annotations

from torch import Tensor

from losa_kernels.grouped_masked_lora import one_by_one
from losa_kernels.grouped_masked_lora.groups import Gradients, Groups
from losa_kernels.masked_lora import reference


def forward(x: Tensor, ends: Tensor, groups: Groups) -> Tensor:
    """Of ``one_by_one.forward``."""
    return one_by_one.forward(reference.forward, x, ends, groups)


def backward(grad_y: Tensor, x: Tensor | None, ends: Tensor, groups: Groups, needs: list[bool]) -> Gradients:
    """Of ``one_by_one.backward``."""
    return one_by_one.backward(reference.backward, grad_y, x, ends, groups, needs)
