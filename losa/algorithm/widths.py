"""The width of the box around a round's sparsity, chosen by the loss on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from losa.algorithm.block import WrappedBlock
from losa.algorithm.measures import Measured, input_norms
from losa.distributed.sharding import gathered
from losa.distributed.stop import check
from losa.distributed.watch import progress
from losa.pruners.base import Pattern
from losa_kernels import wanda_mask


def best_width(
    measured: Measured, tried: Mapping[float, Sequence[Pattern]], nested: bool, loss: Callable[[], float]
) -> float:
    """The half width whose patterns give the lowest loss; of equal losses the first.

    Every candidate's masks are Wanda's, of one and the same pass for input norms, whatever the recipe's pruner: they
    rank rates, at the price of one selection and one evaluation each. The model's own masks are put back.

    Args:
        tried: by half width, the patterns of all blocks.
        nested: what is pruned already stays pruned.
        loss: of the model as it is, on calibration text.
    """
    norms = list(input_norms(measured))
    losses = {}
    for width, patterns in tried.items():
        progress(f"trying rates within {width:.3f} of the mean")
        check()
        with _masks_of(measured.blocks, norms, patterns, nested):
            losses[width] = loss()
    return min(losses, key=losses.__getitem__)


@contextmanager
def _masks_of(
    blocks: Sequence[WrappedBlock], norms: Sequence[dict[str, Tensor]], patterns: Sequence[Pattern], nested: bool
) -> Iterator[None]:
    """Wanda's masks by ``norms`` and ``patterns`` for the time being. They are other parameters, sharded as the model's
    own are, and so are weights that a layer sets to zero with its mask."""
    own = [(linear, linear.mask, linear.weight) for block in blocks for linear in block.linears.values()]
    try:
        for block, inputs, pattern in zip(blocks, norms, patterns, strict=True):
            with gathered(block.module):
                for name, linear in block.linears.items():
                    kept = linear.mask.data if nested else None
                    mask = wanda_mask(linear.dense_weight(), inputs[name], mask=kept, **pattern.as_kwargs())
                    linear.mask = nn.Parameter(torch.empty_like(linear.mask), requires_grad=False)
                    linear.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
                    linear.set_mask(mask)
        yield
    finally:
        for linear, mask, weight in own:
            linear.mask, linear.weight = mask, weight
