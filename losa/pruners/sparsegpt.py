"""SparseGPT: prune and compensate by the inverse Hessian (Frantar and Alistarh 2023)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from losa.errors import NumericsError, RecipeError
from losa.pruners.base import Pattern, Pruned, check_finite
from losa.recipe import PruneConfig
from losa_kernels import sparsegpt_prune, wanda_mask
from losa_kernels.column_sweep import SingularHessianError, inverse_factor


class SparseGPT:
    """Kept weights are updated; ``Pruned.damping`` is what the Hessian needed, as a share of its mean diagonal.

    A Hessian that stays singular raises NumericsError. With ``on_singular: wanda`` it gives Wanda's mask instead, from
    the norms on the Hessian's diagonal (||X_j|| = sqrt(H_jj)): ``weight`` is None and ``damping`` infinite, which
    records that no damping was enough. Linears that share their inputs come one after another with the very same
    Hessian: its factor is computed once and kept while that tensor lives.

    Raises RecipeError when N:M groups would straddle column blocks (``prune.block_size`` no multiple of M).
    """

    statistic = "hessian"
    updates_weight = True

    def __init__(self, config: PruneConfig):
        if config.keep_n_m is not None and config.block_size % config.keep_n_m[1]:
            raise RecipeError(
                f"prune.block_size: expected a multiple of {config.keep_n_m[1]} for the pattern "
                f"{config.pattern!r}, got {config.block_size}"
            )
        self.damping = config.damping
        self.block_size = config.block_size
        self.on_singular = config.on_singular
        self._factored: weakref.ref | None = None
        self._version = 0
        self._factor: tuple[Tensor, float] | None = None

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        check_finite(weight)
        try:
            result = sparsegpt_prune(
                weight,
                statistic,
                damping=self.damping,
                block_size=self.block_size,
                mask=mask,
                factor=self._factor_of(statistic) if weight.dtype != torch.float64 else None,
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

    def _factor_of(self, hessian: Tensor) -> tuple[Tensor, float]:
        """``inverse_factor`` in fp32, of the last Hessian from memory."""
        known = None if self._factored is None else self._factored()
        if known is not hessian or self._version != hessian._version:
            self._factor = None
            self._factor = inverse_factor(hessian.float(), self.damping)
            self._factored, self._version = weakref.ref(hessian, self._forget), hessian._version
        return self._factor

    def _forget(self, gone: weakref.ref) -> None:
        if self._factored is gone:
            self._factored = self._factor = None
