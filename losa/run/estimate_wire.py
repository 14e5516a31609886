"""Bytes that one GPU takes in, stage by stage: from other GPUs, and from host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from losa.algorithm.schedule import Round
from losa.algorithm.statistics import get_statistic
from losa.pruners import get_pruner
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.sections import Recipe
from losa.run.cluster import Cluster, Traffic
from losa.run.estimate_memory import highest_rank, largest_share
from losa.run.estimate_sharded import adapters_of, block_parts, own_bytes, whole_bytes
from losa.run.estimate_work import Stage, windows_of_one
from losa.run.model_shape import ModelShape, Rows
from losa.run.placement import Placement

# Before the first stream of a run: two whole passes, and one block by block (``losa.algorithm.stream``).
CHECKS = 3


@dataclass(frozen=True)
class Wires:
    """Counts what a recipe's stages send on a cluster."""

    recipe: Recipe
    shape: ModelShape
    rounds: dict[MethodName, list[Round]]
    cluster: Cluster
    placement: Placement

    def of(self, stage: Stage) -> list[Traffic]:
        """All of a stage's rounds, steps or passes."""
        found = {"pruning": self._pruning, "training": self._training, "evaluation": self._evaluation}[stage.kind]
        return [traffic for traffic in found(stage) if traffic.received or traffic.from_host]

    def _pruning(self, stage: Stage) -> Iterator[Traffic]:
        recipe, shape, processes = self.recipe, self.shape, self.placement.processes
        pruner, rounds = get_pruner(recipe.prune), stage.times
        assert stage.method is not None
        dynamic = METHODS[stage.method].dynamic
        compares = dynamic and recipe.compares_samples
        # To prune, and to compare samples.
        passes = 1 + compares
        first = stage.method == next(iter(self.rounds))
        once = 1 + (CHECKS if first else 0)
        how = f"all blocks whole, one by one: {passes} times a round, {once} times in all"
        yield self.gathered("blocks", passes * rounds + once, how)
        if dynamic:
            adapters = adapters_of(shape.pruned, highest_rank(self.rounds))
            yield self.gathered("adapters", rounds, "whole, block by block, to change ranks", adapters)
        if pruner.statistic is not None:
            flat = get_statistic(pruner.statistic).flat
            sizes = sum(flat(w.inputs, torch.device("meta")).nbytes for w in shape.pruned)
            how = f"{pruner.statistic}, to each linear's owner; at most: inputs are shared"
            yield self.cluster.broadcast("statistics", sizes, processes, how).times(rounds)
        masks = sum(w.outputs * -(-w.inputs // 8) for w in shape.pruned)
        yield self.cluster.broadcast("masks", masks, processes, "1 bit a weight, from the owners").times(rounds)
        if pruner.updates_weight:
            new = shape.dtype.itemsize * shape.prunable
            yield self.cluster.broadcast("new weights", new, processes, "from the owners").times(rounds)
            dense = [Rows(w.outputs, shape.dtype.itemsize * w.inputs) for w in shape.pruned]
            how = "whole again from the second round on, for the dense stream" + " and to regrow" * recipe.prune.regrow
            again = (rounds - 1) * (dynamic + recipe.prune.regrow)
            yield self.gathered("dense weights", again, how, dense, on_host=True)
        if compares:
            samples, batch = recipe.calibration.samples, recipe.calibration.batch_size
            own = largest_share(min(recipe.calibration.cka_samples, samples), batch, processes)
            features = own * recipe.calibration.length * shape.hidden * shape.dtype.itemsize * shape.blocks
            how = "own samples x length x hidden x blocks, a slice to each process"
            yield self.cluster.all_to_all("features for CKA", features, processes, how).times(rounds)

    def _training(self, stage: Stage) -> Iterator[Traffic]:
        recipe, placement, steps = self.recipe, self.placement, stage.times
        assert recipe.train is not None
        adapters = adapters_of(self.shape.pruned, highest_rank(self.rounds))
        how = "fp32 gradients of the adapters, once a step"
        if placement.shard_size is None:
            yield self.cluster.all_reduce("gradients", whole_bytes(adapters), placement.processes, how).times(steps)
            return
        passes = 2 if recipe.distributed.reshard_after_forward else 1
        blocks = "weights, masks and adapters, whole for the forward" + (" and for the backward pass" * (passes - 1))
        yield self.gathered("blocks", recipe.train.gradient_accumulation * passes * steps, blocks)
        own = self.cluster.all_gather("gradients", whole_bytes(adapters), placement.shard_size, how)
        yield own.times(steps)
        if placement.copies > 1:
            # The GPUs of a machine have rows of their own, and so each its own partners in other machines.
            partners = replace(self.cluster, per_machine=1)
            rows = own_bytes(adapters, placement.shard_size)
            how = f"own rows of them, among {placement.copies} copies"
            yield partners.all_reduce("gradients of copies", rows, placement.copies, how).times(steps)

    def _evaluation(self, stage: Stage) -> Iterator[Traffic]:
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        batches = -(-windows_of_one(evaluation, self.placement.processes) // evaluation.batch_size)
        how = f"all blocks whole, one by one, for each of {batches} batches, and to see how logits are made"
        yield self.gathered("blocks", (batches + 1) * stage.times, how)

    def gathered(
        self, what: str, times: float, how: str, rows: list[Rows] | None = None, on_host: bool = False
    ) -> Traffic:
        """Parameters of these ``rows`` whole for a while, so many times; None: every block, and whatever is outside of
        the blocks. ``on_host``: the rows wait in host memory, as all rows do if the model is offloaded."""
        placement = self.placement
        if placement.shard_size is None:
            return Traffic(what, 0, 0, how)
        if rows is None:
            parts = [self.shape.outside, *block_parts(self.shape, highest_rank(self.rounds))]
            rows = [each for part in parts for each in part]
        found = self.cluster.all_gather(what, whole_bytes(rows), placement.shard_size, how)
        if placement.offload or on_host:
            found = replace(found, from_host=own_bytes(rows, placement.shard_size))
        return found.times(times)
