"""Bytes that one GPU takes in, stage by stage: from other GPUs, and from host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from losa.algorithm.gradients import REGROWTH, wanted_gradients
from losa.algorithm.schedule import Round
from losa.algorithm.statistics import Statistic, get_statistic
from losa.pruners import get_pruner
from losa.recipe.methods import METHODS, MethodName
from losa.recipe.rates import RATES, passes_for, selections_for
from losa.recipe.sections import Recipe
from losa.run.cluster import Cluster, Traffic
from losa.run.estimate_memory import Trained, highest_rank, largest_share, replaces_weights
from losa.run.estimate_sharded import block_parts, masks_of, own_bytes, sent_bytes, weights_of, whole_bytes
from losa.run.estimate_work import Stage, other_batches, windows_of_one
from losa.run.model_shape import ModelShape, Rows
from losa.run.placement import Placement

# Before the first stream of a run: two whole passes, and one block by block (``losa.algorithm.stream``). A whole pass
# for each size of a batch follows.
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
        dynamic, dense = METHODS[stage.method].dynamic, recipe.streams_dense(stage.method)
        rated = recipe.rated(stage.method)
        # What is sent for other rates is small: tokens of 256, norms, energies, or two numbers a block.
        compares = rated and RATES[recipe.allocation.rates].needs == "similarity"
        rates = recipe.allocation.rates, recipe.allocation.delta
        for_rates, tried = (passes_for(*rates), selections_for(*rates)) if rated else (0, 0)
        samples, batch = recipe.calibration.samples, recipe.calibration.batch_size
        compared = largest_share(min(recipe.calibration.cka_samples, samples), batch, processes)
        # To prune, to measure what rates need, to try masks, and for each batch that they are tried on.
        passes = 1 + for_rates + tried * -(-compared // batch)
        # Sparse and dense stream, and passes for rates: each makes what is outside of the blocks whole.
        streams = 1 + dense + for_rates
        first = stage.method == next(iter(self.rounds))
        once = 1 + (CHECKS + len(other_batches(recipe)) if first else 0)
        how = f"one by one: {passes} times a round, {once} times in all"
        yield from self.gathered(passes * rounds + once, streams * rounds + first, how, stage.method)
        if dynamic and self.placement.sharded:
            adapters = self._trained(stage.method).rows(shape.pruned)
            yield self._made_whole("adapters", adapters, "block by block, to change ranks").times(rounds)
        # Weights that a pruner changes wait in host memory as they were.
        again = (rounds - 1) * (dense + (not recipe.prune.decisions_nested))
        if pruner.updates_weight and self.placement.sharded and again:
            how = f"as they were, from round 2 on, {again} times"
            yield self._made_whole("dense weights", weights_of(shape), how, on_host=True).times(again)
        gradients = wanted_gradients(recipe.prune, pruner)
        for key in gradients:
            how = f"{key}: fp32, to each linear's owner"
            times = rounds - (key == REGROWTH)
            yield self.cluster.broadcast("statistics of gradients", 4 * shape.prunable, processes, how).times(times)
        statistic = None if pruner.statistic is None else get_statistic(pruner.statistic)
        if statistic is not None and issubclass(statistic, Statistic):
            sizes = sum(statistic.flat(w.inputs, torch.device("meta")).nbytes for w in shape.pruned)
            how = f"{pruner.statistic}, to each linear's owner; at most: inputs are shared"
            yield self.cluster.broadcast("statistics", sizes, processes, how).times(rounds)
        masks = whole_bytes(masks_of(shape.pruned))
        yield self.cluster.broadcast("masks", masks, processes, "1 bit a weight, from the owners").times(rounds)
        if pruner.updates_weight:
            new = shape.dtype.itemsize * shape.prunable
            yield self.cluster.broadcast("new weights", new, processes, "from the owners").times(rounds)
        if recipe.reconstruct is not None and recipe.reconstructs(stage.method):
            trained = whole_bytes(self._trained(stage.method).rows(shape.pruned))
            how = "fp32 gradients of a block's adapters, once a step of its reconstruction"
            every = self.cluster.all_reduce("gradients of blocks", trained, processes, how)
            yield every.times(rounds * recipe.reconstruct.steps)
        if compares:
            features = compared * recipe.calibration.length * shape.hidden * shape.dtype.itemsize * shape.blocks
            how = "own samples x length x hidden x blocks, a slice to each process"
            yield self.cluster.all_to_all("features for CKA", features, processes, how).times(rounds)

    def _training(self, stage: Stage) -> Iterator[Traffic]:
        recipe, placement, steps = self.recipe, self.placement, stage.times
        assert recipe.train is not None and stage.method is not None
        adapters = self._trained(stage.method).rows(self.shape.pruned)
        how = "fp32 gradients of the adapters, once a step"
        if placement.shard_size is None:
            yield self.cluster.all_reduce("gradients", whole_bytes(adapters), placement.processes, how).times(steps)
            return
        distills = recipe.train.distill is not None
        # A teacher's blocks that are not dropped are there for the pass that trains.
        passes = 2 + distills if recipe.distributed.reshard_after_forward else 1
        forward = recipe.train.gradient_accumulation * steps
        rounds = sum(each.sequences > 0 for each in self.rounds[stage.method])
        teacher = "for the teacher's, " * (passes > 2)
        how = f"{teacher}for the forward" + (" and for the backward pass" * (passes > 1)) + ", and once before a round"
        yield from self.gathered(forward * passes + rounds, forward + rounds, how, stage.method)
        if distills and replaces_weights(recipe, [stage.method]):
            dense = self._made_whole("dense weights", weights_of(self.shape), "for the teacher's passes")
            yield dense.times(forward)
        how = "fp32 gradients of the adapters, once a step, with rows up to as many as the first process has"
        sent = sent_bytes(adapters, placement.shard_size)
        yield self.cluster.all_gather("gradients", sent, placement.shard_size, how).times(steps)
        if placement.copies > 1:
            # Processes of a machine that hold the same rows, of several copies, are partners; all others of a copy have
            # rows of their own, and so partners of their own in other machines.
            partners = replace(self.cluster, per_machine=max(1, self.cluster.per_machine // placement.shard_size))
            rows = own_bytes(adapters, placement.shard_size)
            how = f"own rows of them, among {placement.copies} copies"
            yield partners.all_reduce("gradients of copies", rows, placement.copies, how).times(steps)

    def _evaluation(self, stage: Stage) -> Iterator[Traffic]:
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        batches = -(-windows_of_one(evaluation, self.placement.processes) // evaluation.batch_size)
        how = f"one by one, for each of {batches} batches and once before them"
        yield from self.gathered((batches + 1) * stage.times, stage.times, how, stage.method)

    def _trained(self, method: MethodName | None) -> Trained:
        """What a method trains: every weight, or adapters of the highest rank of any method."""
        full = method is not None and METHODS[method].adapter == "weights"
        return Trained(None if full else highest_rank(self.rounds))

    def gathered(self, blocks: float, outside: float, how: str, method: MethodName | None = None) -> Iterator[Traffic]:
        """Every block of a method's model made whole so many times, and whatever is outside of the blocks so many."""
        if self.placement.sharded:
            parts = block_parts(self.shape, self._trained(method))
            every = [rows for part in parts for rows in part]
            yield self._made_whole("blocks", every, f"all blocks whole, {how}").times(blocks)
            yield self._made_whole("outside of the blocks", self.shape.outside, "whole throughout a pass").times(
                outside
            )

    def _made_whole(self, what: str, parameters: list[Rows], how: str, on_host: bool = False) -> Traffic:
        """Parameters whole once. ``on_host``: its rows wait in host memory, as all do where the model is offloaded."""
        size = self.placement.shard_size or 1
        found = self.cluster.all_gather(what, sent_bytes(parameters, size), size, how)
        return replace(found, from_host=own_bytes(parameters, size)) if on_host or self.placement.offload else found
