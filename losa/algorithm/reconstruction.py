"""How far a pruned block's output is from the dense block's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from losa.distributed.processes import from_everyone, process_count


class ErrorMeter:
    """Reconstruction error between a dense and a sparse block output, accumulated over batches.

    ``relative``: 1/H sum_c ||(D - S)_c||^2 / ||D_c||^2 over channels c, as the paper's code weighs it (E_l of Eq. 7).
    ``frobenius``: ||D - S||_F, Eq. 1's own. A process's sums over its batches are taken on ``device``.
    """

    def __init__(self, kind: str = "relative", device: torch.device | str = "cpu"):
        self.kind = kind
        self._device = device
        # (2, hidden) fp64: squares of differences, and of the dense outputs.
        self._sums: Tensor | None = None

    def update(self, dense: Tensor, sparse: Tensor) -> None:
        """Take a batch in: outputs (batch, length, hidden) of the dense and of the sparse block, floating point, on any
        device."""
        dense, sparse = (x.to(self._device, non_blocking=True).flatten(0, -2).float() for x in (dense, sparse))
        if self._sums is None:
            self._sums = torch.zeros(2, dense.shape[1], dtype=torch.float64, device=dense.device)
        self._sums[0] += (dense - sparse).square().sum(0)
        self._sums[1] += dense.square().sum(0)

    def update_all(self, dense: Iterable[Tensor], sparse: Iterable[Tensor]) -> None:
        """Take several batches in, as ``update`` does."""
        for d, s in zip(dense, sparse, strict=True):
            self.update(d, s)

    def result(self) -> float:
        """The error over the batches of all processes, of which some may have none. All processes call it together;
        sums are added up in the order of the processes."""
        sums = sum_of_all(self._sums)
        difference, reference = sums
        if self.kind == "frobenius":
            return difference.sum().sqrt().item()
        alive = reference > 0
        return (difference[alive] / reference[alive]).sum().item() / len(reference)


def sum_of_all(sums: Tensor | None) -> Tensor:
    """The sum of all processes' tensors, added up in the order of the processes, on the host where there are several;
    None from a process that had no batch. All processes call it together."""
    if process_count() > 1:
        sums = sum(part for part in from_everyone(None if sums is None else sums.cpu()) if part is not None)
    assert isinstance(sums, Tensor), "no process had a batch"
    return sums
