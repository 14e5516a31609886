"""What every pruning method is: it names the statistic that it needs, then decides about a block's linears."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from losa.errors import NumericsError
from losa.pruners.cost import Memory, PruningShape, one_linear_memory
from losa.pruners.structure import Structure
from losa.recipe.sections import PruneConfig
from losa_kernels.tensors import all_finite


@dataclass(frozen=True)
class Pattern:
    """What to keep: a share of weights (``sparsity``), or ``keep_n`` of every ``m`` along a row. ``whole``: the share
    is of the matrix, also for a pruner that counts in each row where it has the choice."""

    sparsity: float | None = None
    keep_n: int | None = None
    m: int | None = None
    whole: bool = False

    def __post_init__(self):
        sparsity, keep_n, m = self.sparsity, self.keep_n, self.m
        if (sparsity is None) == (keep_n is None) or (keep_n is None) != (m is None):
            raise ValueError(f"Pattern: give sparsity, or keep_n and m; got {self}")
        if self.whole and sparsity is None:
            raise ValueError(f"whole: expected a sparsity, got {keep_n}:{m}")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise ValueError(f"sparsity: expected 0 <= sparsity < 1, got {sparsity}")
        if keep_n is not None and m is not None and not 0 < keep_n <= m:
            raise ValueError(f"keep_n: expected 0 < keep_n <= m, got {keep_n}:{m}")

    @property
    def target(self) -> float:
        """The share of weights pruned."""
        if self.sparsity is not None:
            return self.sparsity
        assert self.keep_n is not None and self.m is not None
        return 1 - self.keep_n / self.m

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


class Pruner:
    """One pruning method, built as ``cls(config: PruneConfig)``: override ``prune``, or ``prune_block`` where linears
    depend on each other.

    ``statistic`` names what calibration collects of each linear (``losa.algorithm.statistics``), None for nothing. Of
    its inputs "input_norms" is ``||X_j||_2``, (in,) fp32; "hessian" is ``X^T X``, (in, in) fp32. Of its gradients
    "gradient_norms" and "gradient_sums" are (out, in) fp32 (``losa.algorithm.gradient_statistics``).
    ``updates_weight``: whether kept weights change, which takes memory for another set of weights. ``structured``:
    whether whole attention heads and MLP channels go, as many in every block. Such a pruner is given ``structure``
    before it prunes, takes the same rate for all blocks, and its model is exported as a smaller one, without the rows
    and columns that are pruned. ``counts``: what keeps an exact number of weights for a sparsity: each row, the matrix,
    or either, as ``Pattern.whole`` says.

    Several processes share out the linears of a block. A class that overrides ``prune_block`` gets all linears of a
    block in one process. An object of that class then sees every N-th block only, and keeps no state from block to
    block.
    """

    statistic: str | None = None
    updates_weight: bool = False
    structured: bool = False
    counts: Literal["row", "matrix", "either"] = "row"
    structure: Structure | None = None

    def __init__(self, config: PruneConfig):
        """What the method takes from the recipe. Raises RecipeError for settings that it cannot follow."""

    def prune(self, weight: Tensor, statistic: Tensor | None, pattern: Pattern, mask: Tensor | None) -> Pruned:
        """Decide about one linear.

        Args:
            weight: (out, in) fp32, not to be changed: dense values, the adapter included.
            statistic: of the linear's inputs, None without one.
            pattern: what to keep.
            mask: packed (out, ceil(in/8)) uint8, or None. Weights that it has pruned stay pruned and count towards the
                pattern; a row, group or matrix that has lost more than asked keeps its zeros.

        Raises:
            NumericsError, ValueError: values that the method cannot work on.
        """
        raise NotImplementedError  # not abstract: a pruner of whole blocks has prune_block alone

    def prepare(self, statistics: Iterable[Tensor | None]) -> None:
        """Called before ``prune`` decides about the first of several linears: a method may compute something for all
        of them together.

        Args:
            statistics: of the linears' inputs, as ``prune`` takes them. Linears that share their inputs have the very
                same tensor.
        """

    def prune_block(
        self,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern,
        masks: Mapping[str, Tensor | None],
    ) -> Iterator[tuple[str, Pruned]]:
        """Decide about all linears of a block: here one after the other, each by ``prune``.

        An outcome that is yielded goes into the model at once: read what depends on a weight before its outcome is
        yielded.

        Args:
            weights: by the linear's name within the block, each as ``prune`` takes it. A weight is formed whenever it
                is asked for: keep no more of them than the method needs, as each takes a linear's memory in fp32.
            statistics: of each linear's inputs, None without one.
            pattern: what to keep of each linear.
            masks: of each linear, as ``prune`` takes it.

        Yields:
            each linear's name and outcome, once, in any order.

        Raises:
            NumericsError: the message begins with the linear's name and a colon.
        """
        self.prepare(statistics.values())
        for name in weights:
            yield name, self.prune_named(name, weights[name], statistics[name], pattern, masks[name])

    def memory(self, shape: PruningShape) -> list[Memory]:
        """What is held on the device while a block is pruned, next to the model and calibration's hidden states."""
        return [one_linear_memory(shape)]

    def flops(self, shape: PruningShape) -> float:
        """Floating-point operations of one round's matrix products, beyond the model's own forward passes."""
        return 0.0

    def prune_named(self, name: str, *args) -> Pruned:
        """``prune``, whose errors begin with the linear's name and a colon."""
        try:
            return self.prune(*args)
        except (NumericsError, ValueError) as error:
            raise NumericsError(f"{name}: {error}") from error


def check_finite(weight: Tensor) -> None:
    """Raise NumericsError if ``weight`` holds nan or inf."""
    if not all_finite(weight):
        raise NumericsError("weight: expected finite values, got nan or inf")
