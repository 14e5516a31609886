"""What a recipe will cost on a cluster: where the model is held, memory by phase, rounds, work and bytes on the wire.

An estimate from the model's configuration and a cluster's assumed rates; ``losa.run.estimate`` says what it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from losa.algorithm.schedule import Round
from losa.errors import RecipeError
from losa.recipe.sections import Recipe
from losa.run.cluster import Cluster, Traffic
from losa.run.estimate_wire import Wires
from losa.run.estimate_work import Stage, stages, steps_of
from losa.run.holding import Holding, machine_sums, phase_sums
from losa.run.placement import Placement, choose
from losa.run.planned import MARGIN, Planned, needs_whole, planned_model


@dataclass(frozen=True)
class ClusterEstimate:
    """``stages``: of the GPU that computes most, each with what it takes in. ``remedies``: changes of the recipe or the
    cluster that make it fit, each with the memory that a GPU then needs; none where it fits."""

    planned: Planned
    cluster: Cluster
    placement: Placement
    parameters: int
    holdings: list[Holding]
    stages: list[tuple[Stage, list[Traffic]]]
    remedies: list[tuple[str, float]]

    def size(self, phase: str, what: str) -> int:
        """Bytes of a phase's holding. Raises KeyError."""
        return {(h.phase, h.what): h.size for h in self.holdings}[phase, what]

    def device(self) -> dict[str, int]:
        """Bytes that a GPU holds in each phase."""
        return phase_sums(self.holdings, "device")

    def machine(self) -> dict[str, int]:
        """Bytes that the main process's machine holds in host memory in each phase."""
        return machine_sums(self.holdings, self.cluster.fullest)

    def seconds(self, stage: Stage, traffic: list[Traffic]) -> float:
        """The products and then the wire: nothing is taken to overlap."""
        return stage.flops / self.cluster.rate + sum(map(self.cluster.seconds, traffic))

    def round_seconds(self, this_round: Round) -> tuple[float | None, ...]:
        """Pruning, training and evaluation of one round of the main method; None for what it does not do, or whose
        amount is open."""
        main = {s.kind: (s, t) for s, t in self.stages if s.method == self.planned.recipe.method and s.counted}
        recipe = self.planned.recipe
        steps = 0 if recipe.train is None else steps_of(recipe.train, this_round, self.cluster.gpus)
        evaluates = recipe.evaluate is not None and recipe.evaluate.each_round
        return tuple(
            self.seconds(*main[kind]) * count / main[kind][0].times if kind in main and count else None
            for kind, count in (("pruning", 1), ("training", steps), ("evaluation", int(evaluates)))
        )

    @property
    def fits(self) -> bool:
        return _fits(self.planned, self.placement, self.cluster)

    def verdict(self, size: int, memory: float) -> str:
        """Whether so many bytes fit into ``memory``."""
        if MARGIN * size <= memory:
            return "fits"
        return "tight" if size <= memory else "does not fit"


def estimate_cluster(recipe: Recipe, cluster: Cluster) -> ClusterEstimate:
    """Estimate a recipe on GPUs, without any of them and without weights.

    Raises:
        RecipeError: an unknown pruner, or ``distributed`` settings that do not suit so many GPUs.
        ModelError: the configuration cannot be had, or the model has no blocks.
    """
    model = planned_model(recipe)
    planned = Planned.of(recipe, model, torch.device("cuda"), {"device": int(cluster.memory)})
    placement = _placement(planned, cluster)
    planned = planned.on(placement)
    wires = Wires(planned.recipe, planned.shape, planned.rounds, cluster, placement)
    return ClusterEstimate(
        planned=planned,
        cluster=cluster,
        placement=placement,
        parameters=sum(p.numel() for p in model.parameters()),
        holdings=planned.holdings(placement),
        stages=[(s, wires.of(s)) for s in stages(planned.recipe, planned.shape, planned.rounds, cluster.gpus)],
        remedies=[] if _fits(planned, placement, cluster) else _remedies(planned, cluster),
    )


def _placement(planned: Planned, cluster: Cluster) -> Placement:
    return choose(
        planned.recipe.distributed,
        cluster.gpus,
        cluster.fullest,
        lambda found: _fits(planned, found, cluster),
        needs_whole(planned.recipe),
    )


def _fits(planned: Planned, placement: Placement, cluster: Cluster) -> bool:
    fits = planned.needed(placement) <= cluster.memory
    if cluster.host_memory is None:
        return fits
    return fits and planned.needed_by_machine(placement, cluster.fullest) <= cluster.host_memory


def _remedies(planned: Planned, cluster: Cluster) -> list[tuple[str, float]]:
    """Each change that is enough by itself, or the first few changes that are enough together."""

    def needs(settings: dict[str, Any], cluster: Cluster = cluster) -> float | None:
        """Bytes of a GPU; None where it does not fit, or the recipe cannot have the settings."""
        changed = planned.changed(settings)
        try:
            placement = _placement(changed, cluster)
        except RecipeError:
            return None
        return changed.needed(placement) if _fits(changed, placement, cluster) else None

    changes = _changes(planned.recipe, cluster)
    found = [(text, need) for text, settings in changes.items() if (need := needs(settings)) is not None]
    together: dict[str, Any] = {}
    for count, settings in enumerate(changes.values() if not found else (), start=1):
        together |= settings
        if (need := needs(together)) is not None:
            found = [(" and ".join(list(changes)[:count]), need)]
            break
    larger = [replace(cluster, gpus=cluster.gpus << power) for power in range(1, 5)]
    enough = ((c.gpus, needs(_SHARDED, c)) for c in larger)
    more = next(((f"{gpus} GPUs, fsdp", need) for gpus, need in enough if need is not None), None)
    return [*found, *([more] if more else [])]


_SHARDED: dict[str, Any] = {"distributed.mode": "fsdp", "distributed.shard_size": None}


def _changes(recipe: Recipe, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Settings that take less memory, by how a recipe says them; those that cost least come first."""
    found: dict[str, dict[str, Any]] = {}
    train, distributed = recipe.train, recipe.distributed
    sharded = "distributed.mode: fsdp" + " and shard_size: null" * (distributed.shard_size is not None)
    if cluster.gpus > 1 and distributed.mode not in ("auto", "fsdp"):
        found[sharded] = _SHARDED
    if not distributed.reshard_after_forward:
        found["distributed.reshard_after_forward: true"] = {"distributed.reshard_after_forward": True}
    if train is not None and train.batch_size > 1:
        steps = train.batch_size * train.gradient_accumulation
        smaller = {"train.batch_size": 1, "train.gradient_accumulation": steps}
        found[f"train.batch_size: 1 with gradient_accumulation: {steps}"] = smaller
    if train is not None and not train.activation_checkpointing:
        text, wanted = "train.activation_checkpointing: true", {"train.activation_checkpointing": True}
        if distributed.activation_checkpointing is False:
            text += " and distributed.activation_checkpointing: true"
            wanted["distributed.activation_checkpointing"] = True
        found[text] = wanted
    if not distributed.cpu_offload:
        text = "distributed.cpu_offload: true"
        if distributed.mode not in ("auto", "fsdp"):
            text = f"{sharded} and cpu_offload: true"
        found[text] = {**_SHARDED, "distributed.cpu_offload": True}
    return found
