"""Pruner-Zero: |W|^2 times scaled gradients, per row (Dong et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from losa.errors import NumericsError
from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa_kernels import wanda_mask
from losa_kernels.tensors import all_finite


class PrunerZero(Pruner):
    """Score |W_ij|^2 (G_ij - min G) / (max G - min G), the smallest and the largest over the matrix, as the method's
    code has it. Exactly floor(sparsity * in) weights go per row, floor(sparsity * out * in) of a pattern that is
    ``whole``, or all but ``keep_n`` of every m; ties lowest row, then lowest column first; kept weights stay as they
    are.

    Where all entries of G are equal, as in a linear that no sample has reached, magnitudes decide.
    """

    statistic = "gradient_norms"
    counts = "either"

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        assert statistic is not None
        check_finite(weight)
        if not all_finite(statistic):
            raise NumericsError("gradients: expected finite values, got nan or inf")
        # With equal input norms Wanda's selection takes any scores >= 0.
        scores, flat = _scores(weight, statistic), weight.new_ones(weight.shape[1])
        return Pruned(wanda_mask(scores, flat, mask=mask, whole=pattern.whole, **pattern.as_kwargs()))


def _scores(weight: Tensor, gradients: Tensor) -> Tensor:
    smallest, largest = gradients.aminmax()
    span = largest - smallest
    scaled = (gradients - smallest).div_(torch.where(span > 0, span, 1))
    return scaled.add_(span == 0).mul_(weight.square())
