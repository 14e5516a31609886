"""The protocol every pruning method fits: name the statistic it needs, then decide one linear's mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from losa.errors import NumericsError
from losa_kernels.tensors import all_finite

Statistic = Literal["none", "input_norms", "hessian"]


@dataclass(frozen=True)
class Pattern:
    """What to keep: a share of weights (``sparsity``), or ``keep_n`` of every ``m`` along a row."""

    sparsity: float | None = None
    keep_n: int | None = None
    m: int | None = None

    def __post_init__(self):
        unstructured = self.sparsity is not None
        if unstructured == (self.keep_n is not None) or (self.keep_n is None) != (self.m is None):
            raise ValueError(f"Pattern: give sparsity, or keep_n and m; got {self}")
        if unstructured and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected 0 <= sparsity < 1, got {self.sparsity}")
        if not unstructured and not 0 < self.keep_n <= self.m:
            raise ValueError(f"keep_n: expected 0 < keep_n <= m, got {self.keep_n}:{self.m}")

    @property
    def target(self) -> float:
        """The share of weights pruned."""
        return self.sparsity if self.sparsity is not None else 1 - self.keep_n / self.m

    def as_kwargs(self) -> dict:
        """Keyword arguments of the losa_kernels pruning ops."""
        return {"sparsity": self.sparsity} if self.sparsity is not None else {"keep_n": self.keep_n, "m": self.m}


@dataclass
class Pruned:
    """One linear's outcome: packed ``mask`` (out, ceil(in/8)) uint8; ``weight`` (out, in) fp32 where the method
    updates kept weights, else None; ``loss`` the method's own estimate; ``damping`` what the Hessian needed, infinite
    where none was enough and the method fell back to a mask without updates, None where no Hessian is used."""

    mask: Tensor
    weight: Tensor | None = None
    loss: float | None = None
    damping: float | None = None


@runtime_checkable
class Pruner(Protocol):
    """``statistic`` names what calibration collects for each linear; ``prune`` gets it as a tensor.

    ``weight`` (out, in) fp32, not to be changed: dense values, the adapter included. ``statistic``: None, input norms
    (in,) fp32 (``||X_j||_2``), or the Hessian ``X^T X`` (in, in) fp32. ``mask``: packed or None; weights already pruned
    stay pruned and count towards the pattern, and a row, group or matrix that has lost more than asked keeps its zeros.
    ``prune`` raises NumericsError for values it cannot work on. A pruner may have ``prepare(statistics)`` too, which is
    called with all statistics of a block before its linears are pruned one by one.
    """

    statistic: Statistic
    updates_weight: bool

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned: ...


def check_finite(weight: Tensor) -> None:
    """Raise NumericsError if ``weight`` holds nan or inf."""
    if not all_finite(weight):
        raise NumericsError("weight: expected finite values, got nan or inf")
