"""SparseGPT: prune and compensate by the inverse Hessian (Frantar and Alistarh 2023)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from losa.errors import NumericsError, RecipeError
from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa.pruners.cost import Memory, PruningShape, hessian_flops, hessian_memory
from losa.recipe.sections import PruneConfig
from losa_kernels import sparsegpt_prune, wanda_mask
from losa_kernels.pruning import SingularHessianError, inverse_factor, inverse_factors


class SparseGPT(Pruner):
    """Kept weights are updated; ``Pruned.damping`` is what the Hessian needed, as a share of its mean diagonal.

    A Hessian that stays singular raises NumericsError. With ``on_singular: wanda`` it gives Wanda's mask instead, from
    the norms on the Hessian's diagonal (||X_j|| = sqrt(H_jj)): ``weight`` is None and ``damping`` infinite, which
    records that no damping was enough. Linears that share their inputs come one after another with the very same
    Hessian: its factor is computed once and kept while that tensor lives. ``prepare`` factors CUDA Hessians together.

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
        # Each Hessian, the version of it that was factored, and the factor or why there is none.
        self._factored: list[tuple[weakref.ref, int, tuple[Tensor, float] | SingularHessianError]] = []

    def memory(self, shape: PruningShape) -> list[Memory]:
        return [*hessian_memory(shape), *super().memory(shape)]

    def flops(self, shape: PruningShape) -> float:
        return hessian_flops(shape)

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        """Factor CUDA Hessians in one go. Where that cannot be done (one is not finite, memory is short), ``prune``
        factors them one by one, and says whose Hessian is wrong."""
        different = list({id(h): h for h in statistics if h is not None and _factored_together(h)}.values())
        if len(different) < 2:
            return
        self._factored = []
        try:
            found = inverse_factors([hessian.float() for hessian in different], self.damping)
        except (ValueError, torch.OutOfMemoryError):
            return
        for hessian, outcome in zip(different, found, strict=True):
            self._keep(hessian, outcome)

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        assert statistic is not None
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
        """``inverse_factor`` in fp32; a factor that is kept already is not computed again."""
        for reference, version, outcome in self._factored:
            if reference() is hessian and version == hessian._version:
                if isinstance(outcome, SingularHessianError):
                    # A new error each time: the traceback of the kept one would keep the Hessian alive.
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
