"""What a recipe will cost, from the model's configuration alone: parameters, rounds, peak memory, work and time.

An estimate. It counts the tensors that losa holds and the matrix products that it computes. The allocator's slack,
CUDA's own memory, data loading and element-wise work come on top: allow a fifth more memory, and take the time as a
floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from losa.algorithm.schedule import Round
from losa.errors import RecipeError
from losa.recipe.sections import Recipe
from losa.run.estimate_work import Stage, stages
from losa.run.holding import Holding, phase_sums
from losa.run.machine import capacity, product_rate
from losa.run.placement import Placement
from losa.run.planned import Planned, planned_model


@dataclass(frozen=True)
class Estimate:
    """``parameters``: of the whole model, ``prunable``: of the linears that are pruned. ``rounds``: the main method's;
    their sequences are 0 where the recipe leaves the number open, and ``train_length`` is 0 without training.
    ``rate``: measured FLOP/s, or None. ``capacity``: bytes of memory by place, where known. ``routed``: whether it is
    known how many experts of a mixture a token is sent to."""

    model: str
    parameters: int
    prunable: int
    blocks: int
    dtype: str
    device: str
    rounds: list[Round]
    train_length: int
    holdings: list[Holding]
    stages: list[Stage]
    rate: float | None
    capacity: dict[str, int]
    routed: bool

    def size(self, what: str) -> int:
        """Bytes of the holding of that name. Raises KeyError."""
        return {holding.what: holding.size for holding in self.holdings}[what]

    def peak(self, place: str, certain: bool = False) -> tuple[int, str]:
        """Most bytes held at a time on ``place``, and the phase: what is always there and the largest phase's own.
        ``certain``: of what cannot be less alone."""
        sums = phase_sums([holding for holding in self.holdings if holding.certain or not certain], place)
        phase = max(sums, key=sums.__getitem__)
        return sums[phase], phase

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages if stage.counted)

    @property
    def seconds(self) -> float | None:
        """Time of all counted products at the measured rate: a floor. None without a rate."""
        return None if self.rate is None else self.flops / self.rate


def estimate(recipe: Recipe, *, probe: bool = True) -> Estimate:
    """Estimate a recipe on one process, without loading weights. The process holds the model's rows in host memory
    where the recipe has ``distributed.cpu_offload``, and else the whole model, as it would.

    Args:
        probe: measure the device's rate by about a second of matrix products.

    Raises:
        RecipeError: an unknown pruner or device.
        ModelError: the configuration cannot be had, or the model has no blocks.
    """
    device = _device(recipe.device)
    model = planned_model(recipe)
    available = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    memory = capacity(device if available else None)
    if (own := memory.pop("process", None)) is not None:
        memory["host"] = min(own, memory.get("host", own))
    planned = Planned.of(recipe, model, device, memory)
    placement = Placement(1, 1, offload=True) if recipe.distributed.cpu_offload else Placement()
    shape = planned.shape
    largest = max(shape.pruned, key=lambda w: w.numel)
    return Estimate(
        model=recipe.model,
        parameters=sum(p.numel() for p in model.parameters()),
        prunable=shape.prunable,
        blocks=shape.blocks,
        dtype=str(shape.dtype).removeprefix("torch."),
        device=str(device),
        rounds=planned.rounds[recipe.method],
        train_length=planned.train_length,
        holdings=planned.holdings(placement),
        stages=list(stages(recipe, shape, planned.rounds)),
        rate=product_rate(device, shape.computed, largest.inputs, largest.outputs) if probe and available else None,
        capacity=memory,
        routed=shape.work.routed,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device: {str(error).splitlines()[0]}") from error
