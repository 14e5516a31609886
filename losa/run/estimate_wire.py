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
from losa.run.model_shape import ModelShape
from losa.run.placement import Placement


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
        every = [traffic.times(stage.times) for traffic in found(stage)]
        return [traffic for traffic in every if traffic.received or traffic.from_host]

    def _pruning(self, stage: Stage) -> Iterator[Traffic]:
        """One round."""
        recipe, shape, processes = self.recipe, self.shape, self.placement.processes
        calibration, pruner = recipe.calibration, get_pruner(recipe.prune)
        assert stage.method is not None
        compares = METHODS[stage.method].dynamic and recipe.compares_samples
        passes = 2 + compares
        how = f"{passes} x all blocks whole, one by one" + (", one of them for CKA" if compares else "")
        yield self._gathered("blocks for calibration", passes, how)
        if pruner.statistic is not None:
            flat = get_statistic(pruner.statistic).flat
            sizes = sum(flat(w.inputs, torch.device("meta")).nbytes for w in shape.pruned)
            how = f"{pruner.statistic}, to each linear's owner; at most: inputs are shared"
            yield self.cluster.broadcast("statistics", sizes, processes, how)
        masks = sum(w.outputs * -(-w.inputs // 8) for w in shape.pruned)
        yield self.cluster.broadcast("masks", masks, processes, "1 bit a weight, from the owners")
        if pruner.updates_weight:
            yield self.cluster.broadcast("new weights", 4 * shape.prunable, processes, "fp32, from the owners")
        if compares:
            own = largest_share(min(calibration.cka_samples, calibration.samples), calibration.batch_size, processes)
            features = own * calibration.length * shape.hidden * shape.dtype.itemsize * shape.blocks
            how = "own samples x length x hidden x blocks, a slice to each process"
            yield self.cluster.all_to_all("features for CKA", features, processes, how)

    def _training(self, stage: Stage) -> Iterator[Traffic]:
        """One optimiser step."""
        recipe, placement = self.recipe, self.placement
        assert recipe.train is not None
        passes, rank = recipe.train.gradient_accumulation, highest_rank(self.rounds)
        adapters = adapters_of(self.shape.pruned, rank)
        if not placement.sharded:
            how = "fp32 gradients of the adapters, once a step"
            yield self.cluster.all_reduce("gradients", whole_bytes(adapters), placement.processes, how)
            return
        size = placement.shard_size or 1
        times = 2 if recipe.distributed.reshard_after_forward else 1
        how = "all blocks whole" + (" in the forward and in the backward pass" if times == 2 else ", once a pass")
        yield self._gathered("weights, masks, adapters", passes * times, how)
        how = "fp32 gradients of the adapters, a sum of rows to each process"
        yield self.cluster.all_gather("gradients", whole_bytes(adapters), size, how).times(passes)
        if placement.copies > 1:
            # Each GPU of a machine has other rows, so that all of its partners are in other machines.
            own, copies = own_bytes(adapters, size), placement.copies
            how = f"own rows of the gradients, among {copies} copies"
            yield replace(Cluster(copies, 1).all_reduce("gradients of copies", own, copies, how))

    def _evaluation(self, stage: Stage) -> Iterator[Traffic]:
        """One pass over the windows."""
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        batches = -(-windows_of_one(evaluation, self.placement.processes) // evaluation.batch_size)
        yield self._gathered("blocks", batches, f"all blocks whole, one by one, for each of {batches} batches")

    def _gathered(self, what: str, times: float, how: str) -> Traffic:
        """Every block whole for a while, and whatever is outside of the blocks, so many times."""
        placement, rank = self.placement, highest_rank(self.rounds)
        if placement.shard_size is None:
            return Traffic(what, 0, 0, how)
        parts = [self.shape.outside, *block_parts(self.shape, rank)]
        every = [rows for part in parts for rows in part]
        found = self.cluster.all_gather(what, whole_bytes(every), placement.shard_size, how)
        if placement.offload:
            found = replace(found, from_host=own_bytes(every, placement.shard_size))
        return found.times(times)
