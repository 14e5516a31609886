"""A linear whose kept weights are all trained: full fine-tuning under a mask."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa.modules.masked_lora import MaskedLoRALinear
from losa_kernels.masked_lora.weights import masked_linear, merge_masked


class MaskedLinear(MaskedLoRALinear):
    """y = x (M * (W + D))^T + bias: every kept weight is trained, as the change D that it has gone through.

    W stays as it was pruned, so that the dense model is still there. D starts at zero and has the precision of a master
    copy, whatever W has. A pruned entry has no gradient, so that D stays zero there. A training step takes three large
    products (y, dX and dY^T x), as ``MaskedLoRALinear`` does.

    * ``delta`` D (out, in), trained, fp32 (fp64 beside an fp64 weight), in place of ``lora_A`` and ``lora_B``.

    ``rank`` is 0. The arguments ``rank``, ``scaling``, ``dropout_p`` and ``generator`` mean nothing here: there are no
    factors, and no input of an adapter to drop.
    """

    adapter_parts: ClassVar[tuple[str, ...]] = ("delta",)
    has_rank: ClassVar[bool] = False

    delta: nn.Parameter

    @property
    def rank(self) -> int:
        return 0

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"delta": (self.out_features, self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if not self.adapter_enabled:
            return F.linear(x, self.weight, self.bias)
        return masked_linear(x, self.weight, self.mask, self.delta, self.bias)

    def set_rank(self, rank: int, generator: torch.Generator | None = None) -> None:
        """Raises ValueError: there are no ranks."""
        raise ValueError(f"rank: expected no rank of a layer that trains its weights, got {rank}")

    def factors(self) -> tuple[Tensor, Tensor]:
        """Raises ValueError: the trained change is no product."""
        raise ValueError("factors: expected a layer with a low-rank adapter, got one that trains its weights")

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W + D without the mask: fp32 (out, in), a new tensor."""
        return self.weight.float() + self.delta.float()

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """M * (W + D), rounded once to the weight's dtype: (out, in), a new tensor, exactly +0.0 where pruned."""
        return merge_masked(self.weight, self.mask, self.delta)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _make_adapter(self, rank: int, generator: torch.Generator | None) -> None:
        self.dropout_p = 0.0
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros_like(self.weight, dtype=dtype))
