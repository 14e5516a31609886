"""The dense-adapter baseline: plain LoRA beside a masked weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from losa.modules.masked_lora import MaskedLoRALinear


class LoRALinear(MaskedLoRALinear):
    """The dense-adapter baseline: y = x (M * W)^T + s (x A^T) B^T + bias.

    The adapter ignores the mask, so that no merge keeps both the zeros and the function: ``merge`` keeps the zeros,
    ``merge_dense`` the function. ``set_mask`` sets the pruned weights to zero in a copy of the weight, and they never
    come back: each mask must be a subset of the one before, and ``dense_mode``, ``dense_weight`` and ``unwrap`` see the
    zeros.
    """

    _has_zeros = False

    @property
    def weight_is_given(self) -> bool:
        return super().weight_is_given and not self._has_zeros

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = F.linear(x, self.weight, self.bias)
        if not self.adapter_enabled:
            return y
        A, B = self.factors()
        dropped = F.dropout(x, self.dropout_p, self.training)
        low_rank = F.linear(dropped, A.to(x.dtype))
        return y + self.scaling * F.linear(low_rank, B.to(x.dtype))

    def set_mask(self, mask: Tensor) -> None:
        super().set_mask(mask)
        self.weight.data = self.weight.data.masked_fill(~self.mask_bool(), 0)
        self._has_zeros = True

    def merge_dense(self) -> nn.Linear:
        """A plain, frozen linear with weight (M * W) + s B A, unmasked: the function that was trained."""
        return self._plain(self.dense_weight().to(self.weight.dtype))
