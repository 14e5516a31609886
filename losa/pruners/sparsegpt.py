"""SparseGPT: prune and compensate by the inverse Hessian (Frantar and Alistarh 2023)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from losa.errors import RecipeError
from losa.pruners.base import Pattern
from losa.pruners.cost import Memory, PruningShape, hessian_flops, hessian_memory
from losa.pruners.with_hessian import HessianPruner, OfHessians
from losa.recipe.sections import PruneConfig
from losa_kernels import SweepResult, sparsegpt_prune
from losa_kernels.pruning import inverse_factor, inverse_factors


class SparseGPT(HessianPruner):
    """A column sweep over each linear, see ``HessianPruner``.

    Linears that share their inputs come one after another with the very same Hessian: its factor is computed once and
    kept while that tensor lives. ``prepare`` factors CUDA Hessians together.

    Raises RecipeError when N:M groups would straddle column blocks (``prune.block_size`` no multiple of M).
    """

    def __init__(self, config: PruneConfig):
        if config.keep_n_m is not None and config.block_size % config.keep_n_m[1]:
            raise RecipeError(
                f"prune.block_size: expected a multiple of {config.keep_n_m[1]} for the pattern "
                f"{config.pattern!r}, got {config.block_size}"
            )
        super().__init__(config)
        self.block_size = config.block_size
        self._factored: OfHessians[tuple[Tensor, float]] = OfHessians()

    def memory(self, shape: PruningShape) -> list[Memory]:
        return [*hessian_memory(shape), *super().memory(shape)]

    def flops(self, shape: PruningShape) -> float:
        """X^T X, its factor, and the sweep over columns."""
        return hessian_flops(shape, lambda one: 4 / 3 * one.inputs**3 + one.numel * one.inputs)

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        """Factor CUDA Hessians in one go. Where that cannot be done (one is not finite, memory is short), ``prune``
        factors them one by one, and says whose Hessian is wrong."""
        different = list({id(h): h for h in statistics if h is not None and _factored_together(h)}.values())
        if len(different) < 2:
            return
        self._factored.clear()
        try:
            found = inverse_factors([hessian.float() for hessian in different], self.damping)
        except (ValueError, torch.OutOfMemoryError):
            return
        for hessian, outcome in zip(different, found, strict=True):
            self._factored.keep(hessian, outcome)

    def solve(self, weight: Tensor, hessian: Tensor, pattern: Pattern, mask: Tensor | None) -> SweepResult:
        factor = None
        if weight.dtype != torch.float64:
            factor = self._factored.get(hessian, lambda: inverse_factor(hessian.float(), self.damping))
        return sparsegpt_prune(
            weight,
            hessian,
            damping=self.damping,
            block_size=self.block_size,
            mask=mask,
            factor=factor,
            **pattern.as_kwargs(),
        )


def _factored_together(hessian: Tensor) -> bool:
    return hessian.is_cuda and hessian.dtype != torch.float64
