"""Which process decides about which linears of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from losa.distributed.processes import process_count
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners.base import Pruner
from losa.pruners.cost import LinearShape, PruningShape


def owners_of(
    groups: Sequence[Sequence[str]], linears: Mapping[str, MaskedLoRALinear], pruner: Pruner, index: int
) -> dict[str, int]:
    """The process that owns each linear of a block; the same in every process.

    Linears of one group share a statistic, and so an owner. The groups are dealt out by what they cost, the most
    expensive first, each to the process that has the least so far. A pruner of whole blocks gets all linears in one
    process, another one for the next block.

    Args:
        groups: names of linears; each name once.
        linears: of the block, by name.
        index: the block's.
    """
    processes = process_count()
    if type(pruner).prune_block is not Pruner.prune_block:
        return {name: index % processes for group in groups for name in group}
    costs = [_cost([linears[name] for name in group], pruner) for group in groups]
    loads = [0.0] * processes
    owners: dict[str, int] = {}
    for number in sorted(range(len(groups)), key=lambda number: -costs[number]):
        owner = loads.index(min(loads))
        loads[owner] += costs[number]
        owners |= dict.fromkeys(groups[number], owner)
    return owners


def _cost(linears: Sequence[MaskedLoRALinear], pruner: Pruner) -> float:
    """The pruner's operations but those of calibration, and one for each weight."""
    shapes = [LinearShape(linear.in_features, linear.out_features) for linear in linears]
    shape = PruningShape(shapes, blocks=1, tokens=0, on_gpu=linears[0].weight.is_cuda)
    return pruner.flops(shape) + sum(each.numel for each in shapes)
