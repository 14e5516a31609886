"""The sections of a recipe that say how adapters are trained, and blocks reconstructed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from losa.recipe.sources import MAX_COUNT, Section, Sources


class DistillConfig(Section):
    """Distillation from the dense model: (1 - weight) CE + weight T² KL + hidden E
    (``losa.training.distillation.DistillationLoss``)."""

    weight: float = Field(0.5, ge=0, le=1, description="share of the divergence from the dense model's distribution")
    temperature: float = Field(1.0, gt=0, le=1000, description="T, which both distributions are flattened by")
    hidden: float = Field(0.0, ge=0, description="weight of the relative error of the blocks' hidden states")

    @model_validator(mode="after")
    def _something(self):
        if self.weight == 0 and self.hidden == 0:
            raise ValueError("train.distill: expected a weight or a hidden above 0, got 0 for both")
        return self


class TrainConfig(Section):
    """Training of the adapters: AdamW on packed sequences, with a fresh optimiser in each round."""

    data: Sources = Field(description="text to train on")
    length: int = Field(1024, ge=8, le=MAX_COUNT, description="tokens of a packed sequence")
    batch_size: int = Field(8, ge=1, le=MAX_COUNT, description="sequences of a forward pass, per process")
    gradient_accumulation: int = Field(1, ge=1, le=MAX_COUNT, description="forward passes of a step")
    max_tokens: int | None = Field(
        None, gt=0, lt=2**63, description="packed tokens over all rounds; default: the data once"
    )
    round_share: float = Field(0.1, gt=0, le=1, description="share of the data per round; the last takes the rest")
    learning_rate: float = Field(2e-4, gt=0, description="largest learning rate")
    lr_schedule: Literal["per_round", "global"] = Field(
        "per_round", description="warm-up and decay in every round, or once"
    )
    warmup: float = Field(0.3, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's")
    max_grad_norm: float = Field(0.3, gt=0, description="gradients are clipped to this norm")
    train_on: Literal["response", "all"] = Field(
        "response", description="tokens that count in the loss: answers, or all"
    )
    activation_checkpointing: bool = Field(False, description="less memory for about a third more time")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forward and backward; auto: bfloat16 on GPUs that have it"
    )
    tensorboard: bool = Field(False, description="also write metrics for TensorBoard")
    distill: DistillConfig | None = Field(None, description="learn from the dense model too; null: from labels alone")
    norms: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="the norms' weights are trained too, at this factor on the learning rate and without weight decay; "
        "null: not",
    )
    lora_plus: float = Field(1.0, gt=0, le=1000, description="learning rate of an adapter's B over its A's (LoRA+)")


class ReconstructConfig(Section):
    """Block-wise reconstruction in each round: once a block is pruned, its adapters (with ``train.norms`` its norms
    too) are trained by themselves until the block's output comes near the dense model's.
    ``calibration.batch_size`` bounds the samples of a forward pass."""

    steps: int = Field(20, ge=1, le=MAX_COUNT, description="AdamW steps of each block")
    learning_rate: float = Field(2e-3, gt=0, description="largest learning rate; a tenth of the steps is warm-up")
    batch_size: int = Field(4, ge=1, le=MAX_COUNT, description="calibration samples of a step, over all processes")
