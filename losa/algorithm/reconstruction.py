"""How far a pruned block's output is from the dense block's."""

from __future__ import annotations

import torch
from torch import Tensor


class ErrorMeter:
    """Reconstruction error between a dense and a sparse block output, accumulated over batches.

    ``relative``: 1/H sum_c ||(D - S)_c||^2 / ||D_c||^2 over channels c, as the paper's code weighs it (E_l of Eq. 7).
    ``frobenius``: ||D - S||_F, Eq. 1's own. Sums are taken on ``device``.
    """

    def __init__(self, hidden_size: int, kind: str = "relative", device: torch.device | str = "cpu"):
        self.kind = kind
        self.difference, self.reference = torch.zeros(2, hidden_size, dtype=torch.float64, device=device)

    def update(self, dense: Tensor, sparse: Tensor) -> None:
        device = self.difference.device
        dense, sparse = (x.to(device, non_blocking=True).flatten(0, -2).float() for x in (dense, sparse))
        self.difference += (dense - sparse).square().sum(0)
        self.reference += dense.square().sum(0)

    def result(self) -> float:
        if self.kind == "frobenius":
            return self.difference.sum().sqrt().item()
        alive = self.reference > 0
        return (self.difference[alive] / self.reference[alive]).sum().item() / len(self.reference)
