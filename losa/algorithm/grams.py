"""The Gram of features that several processes hold, each those of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losa.distributed.collectives import columns_of_all, sum_over_processes
from losa.distributed.together import together
from losa_kernels import gram


def gram_of_all(features: Callable[[int, int], Tensor], rows: Sequence[int], columns: int, width: int) -> Tensor:
    """Centred Gram (samples, samples) fp32 of all processes' features, in every process.

    The Gram is a sum over columns. Each process computes a part of it, from its share of the columns of all samples. No
    process has all features of all samples. All processes call it together.

    Args:
        features: gives this process's features in the columns from the first number up to the second: (its samples,
            columns), on the device that computes.
        rows: the samples of each process.
        columns: features of a sample.
        width: columns that all processes together exchange at a time.

    Raises:
        ValueError: in every process, when features are not finite.
    """
    samples = sum(rows)
    parts: list[Tensor] = []
    wrong: list[ValueError] = []
    for start in range(0, columns, width):
        share = columns_of_all(features(start, min(start + width, columns)), rows)
        if share.shape[1] == 0 or wrong:
            continue
        try:
            parts = [gram(share, out=parts[0] if parts else None)]
        except ValueError as error:
            wrong.append(error)  # the exchange goes on, for the other processes wait in it

    def check() -> None:
        if wrong:
            raise wrong[0]

    together(check)
    part = parts[0] if parts else torch.zeros(samples, samples, device=share.device)
    return sum_over_processes(part.double()).to(part.dtype)
