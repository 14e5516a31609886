"""How a run's processes hold the model: each of them the whole model, or many together one copy of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from losa.distributed.launch import check_config
from losa.distributed.sharding import Sharding, make_sharding
from losa.errors import RecipeError
from losa.recipe.machines import DistributedConfig
from losa.recipe.sections import Recipe


@dataclass(frozen=True)
class Placement:
    """``processes`` of a run. ``shard_size`` of them hold one copy of the model, each some rows of every parameter;
    None: every process has the whole model. ``offload``: rows wait in host memory."""

    processes: int = 1
    shard_size: int | None = None
    offload: bool = False

    @property
    def sharded(self) -> bool:
        return self.shard_size is not None

    @property
    def copies(self) -> int:
        """How often the model is there."""
        return self.processes // (self.shard_size or 1)

    @property
    def mode(self) -> Literal["whole", "ddp", "fsdp", "hsdp"]:
        if self.shard_size is None:
            return "whole" if self.processes == 1 else "ddp"
        return "fsdp" if self.shard_size == self.processes else "hsdp"

    @property
    def text(self) -> str:
        """Who holds what, for people."""
        held = {
            "whole": "it holds the model",
            "ddp": "each holds the whole model",
            "fsdp": "all hold one model together" if self.processes > 1 else "it holds the model's rows",
            "hsdp": f"{self.shard_size} hold one model together, {self.copies} times",
        }[self.mode]
        return held + ", rows in host memory" * self.offload

    def sharding(self, device: torch.device) -> Sharding | None:
        """What ``losa.distributed.sharding`` takes; None for whole models. All processes call it together.

        Args:
            device: what this process computes on.
        """
        return None if self.shard_size is None else make_sharding(device, self.shard_size, self.offload)


def choose(
    config: DistributedConfig,
    processes: int,
    per_machine: int,
    fits: Callable[[Placement], bool],
    needs_whole: str | None = None,
) -> Placement:
    """The placement that a recipe asks for.

    Args:
        config: the recipe's section.
        per_machine: processes of one machine.
        fits: whether a placement fits into a process's memory. Asked in mode "auto" alone.
        needs_whole: the setting, if there is one, that takes gradients of the whole model, and so no shards. Mode
            "auto" then takes whole models.

    Raises:
        RecipeError: the section does not suit the number of processes (``losa.distributed.launch.check_config``), or
            asks for shards where the model is to be whole.
    """
    check_config(config, processes, per_machine)
    whole, offload = Placement(processes), config.cpu_offload
    if config.mode == "ddp" or (processes == 1 and not offload):
        return whole
    if needs_whole is not None:
        if config.mode == "auto" and not offload:
            return whole
        found = "cpu_offload" if offload else config.mode
        raise RecipeError(
            f"{needs_whole} takes gradients through the whole model, which shards do not give; expected "
            f"distributed.mode: ddp, got {found}"
        )
    if config.mode == "auto" and not offload and fits(whole):
        return whole
    size = (config.shard_size or per_machine) if config.mode == "hsdp" else processes
    return Placement(processes, size, offload)


def check_shards(recipe: Recipe, placement: Placement) -> None:
    """Raises RecipeError where a method needs whole parameters, and processes hold the model together."""
    needy = [name for name, method in recipe.methods.items() if not method.shards]
    if needy and placement.sharded:
        raise RecipeError(
            f"method: {needy[0]!r} shares out ranks by whole adapters: expected distributed.mode ddp, got "
            f"{placement.mode}, in which processes hold the model together"
        )
