"""SparseGPT: prune and compensate by the inverse Hessian (Frantar and Alistarh 2023)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from losa.errors import NumericsError, RecipeError
from losa.pruners.base import Pattern, Pruned, check_finite
from losa.recipe.sections import PruneConfig
from losa_kernels import sparsegpt_prune, wanda_mask
from losa_kernels.pruning import SingularHessianError, inverse_factor, inverse_factors


class SparseGPT:
    """Kept weights are updated; ``Pruned.damping`` is what the Hessian needed, as a share of its mean diagonal.

    A Hessian that stays singular raises NumericsError. With ``on_singular: wanda`` it gives Wanda's mask instead, from
    the norms on the Hessian's diagonal (||X_j|| = sqrt(H_jj)): ``weight`` is None and ``damping`` infinite, which
    records that no damping was enough. Linears that share their inputs come one after another with the very same
    Hessian: its factor is computed once and kept while that tensor lives. ``prepare`` factors a block's all together.

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
        # Hessians, what version of them was factored, and what came of it.
        self._factored: list[tuple[weakref.ref, int, tuple[Tensor, float] | SingularHessianError]] = []

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        """Factor a block's CUDA Hessians together, before ``prune`` asks for them one by one. Where that cannot be done
        (one is not finite, memory is short), ``prune`` does it, and says whose Hessian is wrong."""
        hessians = list({id(h): h for h in statistics if h is not None and _factored_together(h)}.values())
        if len(hessians) < 2:
            return
        self._factored = []
        try:
            found = inverse_factors([hessian.float() for hessian in hessians], self.damping)
        except (ValueError, torch.OutOfMemoryError):
            return
        for hessian, outcome in zip(hessians, found, strict=True):
            self._keep(hessian, outcome)

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
        """``inverse_factor`` in fp32, from memory where the Hessian is one of the last."""
        for reference, version, outcome in self._factored:
            if reference() is hessian and version == hessian._version:
                if isinstance(outcome, SingularHessianError):
                    # A new one: the traceback of one that is kept would keep the Hessian alive.
                    raise SingularHessianError(str(outcome))
                return outcome
        self._factored = []
        outcome = inverse_factor(hessian.float(), self.damping)
        self._keep(hessian, outcome)
        return outcome

    def _keep(self, hessian: Tensor, outcome: tuple[Tensor, float] | SingularHessianError) -> None:
        self._factored.append((weakref.ref(hessian, self._forget), hessian._version, outcome))

    def _forget(self, gone: weakref.ref) -> None:
        self._factored = [entry for entry in self._factored if entry[0] is not gone]


def _factored_together(hessian: Tensor) -> bool:
    return hessian.is_cuda and hessian.dtype != torch.float64
