"""A frozen linear under a mask, without anything to train."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from losa.modules.masked_lora import MaskedLoRALinear
from losa_kernels import masked_lora_linear


class PrunedLinear(MaskedLoRALinear):
    """y = x (M * W)^T + bias: what a method without training needs, however few rows or columns W has.

    ``rank`` is 0. The arguments ``rank``, ``scaling``, ``dropout_p`` and ``generator`` mean nothing here.
    """

    adapter_parts: ClassVar[tuple[str, ...]] = ()
    has_rank: ClassVar[bool] = False

    @property
    def rank(self) -> int:
        return 0

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not self.adapter_enabled:
            return F.linear(x, self.weight, self.bias)
        # An adapter of zeros: autograd then keeps the weight and the mask, and no product of the two.
        A, B = x.new_zeros(1, self.in_features), x.new_zeros(self.out_features, 1)
        return masked_lora_linear(x, self.weight, self.mask, A, B, 0.0, self.bias, 0.0)

    def set_rank(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Raises ValueError: there are no ranks."""
        raise ValueError(f"rank: expected no rank of a layer without an adapter, got {rank}")

    def factors(self) -> tuple[Tensor, Tensor]:
        """Raises ValueError: there are none."""
        raise ValueError("factors: expected a layer with a low-rank adapter, got one without an adapter")

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W without the mask: fp32 (out, in), a new tensor."""
        return self.weight.to(torch.float32, copy=True)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """M * W: (out, in), a new tensor, exactly +0.0 where pruned."""
        return self.weight.masked_fill(~self.mask_bool(), 0)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _make_adapter(self, rank: int, generator: torch.Generator | None) -> None:
        self.dropout_p = 0.0
