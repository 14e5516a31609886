"""SparseGPT: prune and compensate by the inverse Hessian (Frantar and Alistarh 2023)."""

from __future__ import annotations

from torch import Tensor

from losa.errors import NumericsError
from losa.pruners.base import Pattern, Pruned
from losa.recipe import PruneConfig
from losa_kernels import sparsegpt_prune, wanda_mask
from losa_kernels.column_sweep import SingularHessianError


class SparseGPT:
    """Kept weights are updated; ``Pruned.damping`` is what the Hessian needed.

    A Hessian that stays singular raises NumericsError, or, with ``on_singular: wanda``, falls back to Wanda's mask from
    the Hessian's diagonal without changing a weight; the infinite ``damping`` then records it.
    """

    statistic = "hessian"
    updates_weight = True

    def __init__(self, config: PruneConfig):
        self.damping = config.damping
        self.block_size = config.block_size
        self.on_singular = config.on_singular

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        try:
            result = sparsegpt_prune(
                weight,
                statistic,
                damping=self.damping,
                block_size=self.block_size,
                mask=mask,
                **pattern.as_kwargs(),
            )
        except SingularHessianError as error:
            if self.on_singular == "error":
                raise NumericsError(
                    f"{error}; more calibration samples help, or set prune.on_singular: wanda"
                ) from error
            norms = statistic.diagonal().clamp_min(0).sqrt()
            return Pruned(wanda_mask(weight, norms, mask=mask, **pattern.as_kwargs()), damping=float("inf"))
        return Pruned(result.mask, result.weight, float(result.loss.sum()), result.damping)
