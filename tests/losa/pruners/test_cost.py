"""What pruners say that they take."""

from __future__ import annotations

from losa.pruners import LinearShape, PruningShape
from losa.pruners.cost import hessian_memory
from losa_kernels.pruning.factor import TOGETHER


def test_a_gpu_factors_a_large_hessian_in_place():
    """The last linear of a 70B model's MLP has 28,672 inputs, and a Hessian of 3.3 GB."""
    linears = [LinearShape(8192, 8192)] * 2 + [LinearShape(28672, 8192)]

    def factorising(given: list[LinearShape]) -> float:
        found = hessian_memory(PruningShape(given, blocks=1, tokens=1, on_gpu=True))
        return next(cost.size for cost in found if cost.what == "factorising")

    assert factorising(linears) == max(5 * TOGETHER, 1.25 * 4 * 28672**2)
    assert factorising(linears[:2]) == 5 * 2 * 4 * 8192**2
    assert factorising([LinearShape(40960, 8)]) == 1.25 * 4 * 40960**2
