"""Pruning one linear: SparseGPT's Hessian-aware column sweep, ALPS's optimisation, and Wanda's score."""

from __future__ import annotations

from losa_kernels.pruning import cuda, factor
from losa_kernels.pruning.alps import ScaledSpectrum, alps_prune, scaled_spectrum
from losa_kernels.pruning.hessian import accumulate_hessian, complete_hessian, inverse_factor, inverse_factors
from losa_kernels.pruning.reference import SingularHessianError
from losa_kernels.pruning.sweep import SweepResult, sparsegpt_prune
from losa_kernels.pruning.wanda import checks_together, wanda_mask

__all__ = [
    "ScaledSpectrum",
    "SingularHessianError",
    "SweepResult",
    "accumulate_hessian",
    "alps_prune",
    "checks_together",
    "complete_hessian",
    "free_graphs",
    "inverse_factor",
    "inverse_factors",
    "scaled_spectrum",
    "sparsegpt_prune",
    "wanda_mask",
]


def free_graphs() -> None:
    """Free the CUDA graphs that ``sparsegpt_prune`` and ``inverse_factor`` keep between calls, and the several
    copies of weights and Hessians that they hold. Later calls make new ones."""
    cuda.graphs.close()
    factor.graphs.close()
