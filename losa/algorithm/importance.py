"""How much each block matters."""

from __future__ import annotations

import torch
from torch import Tensor


def cka_importance(similarity: Tensor, beta: float = 1.0) -> Tensor:
    """I_l = exp(-beta c_l / sum_k c_k) with c_l = sum_{j != l} CKA(l, j) (Eq. 4, normalised): a block that repeats what
    others carry matters less.

    ``beta`` > 0 rescales importance but keeps its order, and the optimum of Eq. 5 depends on the order only, so rates
    do not depend on it.

    Args:
        similarity: (L, L), diagonal ignored.

    Returns:
        (L,) fp64.

    Raises:
        ValueError: not square, or not finite.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) == 0:
        raise ValueError(f"similarity: expected (L, L), got {tuple(similarity.shape)}")
    if not torch.isfinite(similarity).all():
        raise ValueError("similarity: expected finite values")
    redundancy = similarity.double().clone().fill_diagonal_(0).sum(1)
    total = redundancy.sum()
    return torch.exp(-beta * redundancy / total) if total != 0 else torch.ones_like(redundancy)
