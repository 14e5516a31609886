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

    Args:
        groups: names of linears that share a statistic, and so an owner; each name once.
        linears: of the block, by name.
        index: the block's.
    """
    shapes = [
        [LinearShape(linears[name].in_features, linears[name].out_features) for name in group] for group in groups
    ]
    on_gpu = next(iter(linears.values())).weight.is_cuda
    owners = deal(shapes, pruner, process_count(), index, on_gpu)
    return {name: owner for group, owner in zip(groups, owners, strict=True) for name in group}


def deal(
    groups: Sequence[Sequence[LinearShape]], pruner: Pruner, processes: int, index: int, on_gpu: bool
) -> list[int]:
    """The owner of each group of a block's linears, which share their input.

    The groups are dealt out by what they cost, the most expensive first, each to the process that has the least so
    far. A pruner of whole blocks gets all linears in one process. The next block begins with the next process: a block
    has few groups, and their owners need memory.
    """
    owners = [0] * len(groups)
    if type(pruner).prune_block is Pruner.prune_block:
        costs = [_cost(group, pruner, on_gpu) for group in groups]
        loads = [0.0] * processes
        for number in sorted(range(len(groups)), key=lambda number: -costs[number]):
            owners[number] = loads.index(min(loads))
            loads[owners[number]] += costs[number]
    return [(owner + index) % processes for owner in owners]


def _cost(group: Sequence[LinearShape], pruner: Pruner, on_gpu: bool) -> float:
    """The pruner's operations but those of calibration, and one for each weight. The linears of a group are one wide
    linear here: what a pruner computes of their input, it computes once."""
    one = LinearShape(group[0].inputs, sum(linear.outputs for linear in group))
    return pruner.flops(PruningShape([one], blocks=1, tokens=0, on_gpu=on_gpu)) + one.numel
