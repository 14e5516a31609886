"""ALPS: ADMM chooses the weights that stay, conjugate gradients their values (Meng et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from losa.pruners.base import Pattern
from losa.pruners.cost import Memory, PruningShape, factorising_one, hessian_flops, hessians_of_block, one_linear_memory
from losa.pruners.with_hessian import HessianPruner, OfHessians
from losa.recipe.sections import PruneConfig
from losa_kernels import SweepResult, alps_prune
from losa_kernels.pruning import ScaledSpectrum, scaled_spectrum

# Of a linear: given, scaled, D, U, their sum, B now and before, norms and keys of the selection, masks.
COPIES = 10
PENALTIES = 10  # values of rho until the support is stable, on SmolLM2 at 30 to 80 %; each serves 3 products
CG_PRODUCTS = 14  # ten steps, their first residual, and what is lost before and after


class Alps(HessianPruner):
    """Unstructured counts are over the whole matrix, see ``alps_prune`` and ``HessianPruner``.

    Linears that share their inputs come one after another with the very same Hessian: its eigendecomposition is
    computed once and kept while that tensor lives.
    """

    def __init__(self, config: PruneConfig):
        super().__init__(config)
        self._spectra: OfHessians[ScaledSpectrum] = OfHessians()

    def memory(self, shape: PruningShape) -> list[Memory]:
        return [hessians_of_block(shape), factorising_one(shape), one_linear_memory(shape, COPIES)]

    def flops(self, shape: PruningShape) -> float:
        """X^T X, its eigendecomposition, half a product for each rho, products of ADMM and of conjugate gradients."""
        cubes, products = 9 + PENALTIES, 3 * PENALTIES + CG_PRODUCTS
        return hessian_flops(shape, lambda one: cubes * one.inputs**3 + 2 * products * one.numel * one.inputs)

    def solve(self, weight: Tensor, hessian: Tensor, pattern: Pattern, mask: Tensor | None) -> SweepResult:
        spectrum = None
        if weight.dtype != torch.float64:
            spectrum = self._spectra.get(hessian, lambda: scaled_spectrum(hessian.float(), self.damping))
        return alps_prune(weight, hessian, damping=self.damping, mask=mask, spectrum=spectrum, **pattern.as_kwargs())
