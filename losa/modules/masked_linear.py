"""A linear whose kept weights are all trained: full fine-tuning under a mask."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from losa.modules.masked_lora import MaskedLoRALinear
from losa_kernels import unpack_mask


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
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return _MaskedProduct.apply(x, self.weight, self.mask, self.delta, self.bias)

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
        return _effective(self.weight, self.mask, self.delta, self.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _make_adapter(self, rank: int, generator: torch.Generator | None) -> None:
        self.dropout_p = 0.0
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros_like(self.weight, dtype=dtype))


def _effective(weight: Tensor, mask: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """M * (W + D) in ``dtype``, summed in D's."""
    return torch.add(weight, delta).masked_fill_(~unpack_mask(mask, weight.shape[1]), 0).to(dtype)


class _MaskedProduct(torch.autograd.Function):
    """x (M * (W + D))^T + bias. The backward pass forms the weight anew: kept, it would take the memory of a second
    model."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, mask: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, mask, delta)
        ctx.dtype = x.dtype
        return F.linear(x, _effective(weight, mask, delta, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        x, weight, mask, delta = ctx.saved_tensors
        dx = d_delta = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = grad_y @ _effective(weight, mask, delta, ctx.dtype)
        if ctx.needs_input_grad[3]:
            product = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
            d_delta = product.to(delta.dtype).masked_fill_(~unpack_mask(mask, weight.shape[1]), 0)
        if ctx.needs_input_grad[4]:
            d_bias = grad_y.flatten(0, -2).sum(0)
        return dx, None, None, d_delta, d_bias
