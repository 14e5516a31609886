"""The sections of a recipe that say where and how it runs, and nothing of its result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from losa.recipe.sources import MAX_COUNT, Section


class DistributedConfig(Section):
    """How several processes share a run. One process that holds its model whole needs no settings."""

    mode: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="ddp: every process has the whole model; fsdp: all hold one together; hsdp: shard_size hold "
        "one together; auto: ddp where the model fits, else fsdp",
    )
    shard_size: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="processes that hold one copy (hsdp); default: those of one machine"
    )
    cpu_offload: bool = Field(False, description="shards wait in host memory (fsdp, hsdp; auto is then fsdp)")
    reshard_after_forward: bool = Field(
        True, description="drop a block's weights between its forward and backward pass (fsdp, hsdp)"
    )
    activation_checkpointing: bool | None = Field(
        None, description="train.activation_checkpointing of a sharded model; default: as there"
    )
    timeout: float = Field(1800, ge=10, le=86400, description="seconds without progress after which a run ends")

    @model_validator(mode="after")
    def _settings_of_the_mode(self):
        if self.shard_size is not None and self.mode != "hsdp":
            raise ValueError(f"distributed.shard_size: expected mode hsdp, got {self.mode}, which has no shard size")
        for name in ("cpu_offload", "reshard_after_forward", "activation_checkpointing"):
            if self.mode == "ddp" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"distributed.{name}: expected mode fsdp or hsdp, got ddp, which has no shards")
        return self


class CheckpointConfig(Section):
    """How often a run saves a state that it can go on from. The end of each round that trains is always saved."""

    every_steps: int | None = Field(None, ge=1, le=MAX_COUNT, description="training steps between states")
    every_minutes: float | None = Field(15, gt=0, description="minutes of training between states; null: not by time")
    keep: int = Field(2, ge=1, le=1000, description="how many states are kept")
    asynchronous: bool = Field(True, description="go on training while a state is written")
