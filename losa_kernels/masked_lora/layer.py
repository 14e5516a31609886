"""The layer that every implementation of the masked-LoRA linear takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Up to which rank a GPU's ordinary units multiply B A into a tile of W_eff: at 16 that is 9 of the 23 us that the bytes
# take.
DIRECT_RANK = 16


class Layer(NamedTuple):
    """W_eff = M * (W + s B A), as its parts.

    ``weight`` W (out, in); ``mask`` M packed uint8 (out, ceil(in / 8)), or None for W != 0; ``lora_A`` (r, in);
    ``lora_B`` (out, r), never multiplied by s; ``scaling`` s. A product that needs s B takes :meth:`scaled_B`, which
    code calls sB; the other products multiply their wide sums by s.
    """

    weight: Tensor
    mask: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def scaled_B(self, dtype: torch.dtype) -> Tensor:
        """s B (out, r) in ``dtype``, a new tensor."""
        return self.lora_B.to(dtype) * self.scaling
