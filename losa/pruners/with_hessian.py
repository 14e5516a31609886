"""What pruners that take the Hessian of a linear's inputs share: what is computed of it once, and a singular one."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from losa.errors import NumericsError
from losa.pruners.base import Pattern, Pruned, Pruner, check_finite
from losa.recipe.sections import PruneConfig
from losa_kernels import SweepResult, wanda_mask
from losa_kernels.pruning import SingularHessianError

_T = TypeVar("_T")


class OfHessians(Generic[_T]):
    """What was computed of each Hessian, or why it could not be; kept while that very tensor lives, unchanged."""

    def __init__(self):
        self._kept: list[tuple[weakref.ref, int, _T | SingularHessianError]] = []

    def get(self, hessian: Tensor, compute: Callable[[], _T]) -> _T:
        """What is kept of ``hessian``, else what ``compute`` returns, which alone is then kept.

        Raises SingularHessianError: the kept one, or that of ``compute``.
        """
        for reference, version, outcome in self._kept:
            if reference() is hessian and version == hessian._version:
                if isinstance(outcome, SingularHessianError):
                    # A new error each time: the traceback of the kept one would keep the Hessian alive.
                    raise SingularHessianError(str(outcome))
                return outcome
        self.clear()
        outcome = compute()
        self.keep(hessian, outcome)
        return outcome

    def keep(self, hessian: Tensor, outcome: _T | SingularHessianError) -> None:
        self._kept.append((weakref.ref(hessian, self._forget), hessian._version, outcome))

    def clear(self) -> None:
        self._kept = []

    def __len__(self) -> int:
        return len(self._kept)

    def _forget(self, gone: weakref.ref) -> None:
        self._kept = [entry for entry in self._kept if entry[0] is not gone]


class HessianPruner(Pruner, ABC):
    """Kept weights are updated by ``solve``; ``Pruned.damping`` is what the Hessian needed, as a share of its mean
    diagonal.

    A Hessian that stays singular raises NumericsError. With ``on_singular: wanda`` Wanda's scores decide instead, over
    the matrix, from the norms on the Hessian's diagonal (||X_j|| = sqrt(H_jj)): ``weight`` is None and ``damping``
    infinite, which records that no damping was enough.
    """

    statistic = "hessian"
    updates_weight = True
    counts = "matrix"

    def __init__(self, config: PruneConfig):
        self.damping = config.damping
        self.on_singular = config.on_singular

    @abstractmethod
    def solve(self, weight: Tensor, hessian: Tensor, pattern: Pattern, mask: Tensor | None) -> SweepResult:
        """The method's outcome; raises SingularHessianError."""

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        assert statistic is not None
        check_finite(weight)
        try:
            result = self.solve(weight, statistic, pattern, mask)
        except SingularHessianError as error:
            if self.on_singular == "error":
                raise NumericsError(
                    f"{error}; more calibration samples help, or set prune.on_singular: wanda"
                ) from error
            norms = statistic.diagonal().clamp_min(0).sqrt()
            whole = pattern.sparsity is not None
            found = wanda_mask(weight, norms, mask=mask, whole=whole, **pattern.as_kwargs())
            return Pruned(found, damping=float("inf"))
        return Pruned(result.mask, result.weight, float(result.loss.sum()), result.damping)
