"""The numbers of optimiser steps: they stay on the device until they are written down."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from losa.errors import NumericsError
from losa.training.metrics import Metrics


@dataclass(frozen=True)
class Step:
    """One optimiser step whose numbers nobody has read yet.

    ``index``: over all rounds, from 1. ``where``: for messages. ``labels``, ``tokens``: label and input tokens over all
    processes. ``loss``: scalar tensor, summed over the label tokens, in nats. ``norm``: scalar tensor, the gradient's
    norm before clipping.
    """

    index: int
    where: str
    labels: int
    tokens: int
    learning_rate: float
    loss: Tensor
    norm: Tensor


@dataclass
class StepLog:
    """The steps of a round, in order. Only ``read`` waits for the device.

    Args:
        metrics: gets a line per step.
        bar: shows the newest loss that was read.
    """

    round_index: int
    metrics: Metrics
    bar: tqdm
    steps: int = 0
    labels: int = 0
    loss: float = 0.0
    _unread: list[Step] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def begin(self) -> None:
        """A step is about to start: the clock starts with the first step that is not read yet."""
        if not self._unread:
            self._since = time.perf_counter()

    def add(self, step: Step) -> None:
        self._unread.append(step)

    def read(self) -> None:
        """Fetch the numbers of all steps since the last call and write them down.

        Steps that are read together share their tokens per second, which is the mean over all of them.

        Raises:
            NumericsError: a non-finite loss or gradient norm; names the first step that has one. The steps before it
                are written down.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        losses = torch.stack([step.loss for step in steps]).tolist()
        norms = torch.stack([step.norm for step in steps]).tolist()
        seconds = time.perf_counter() - self._since
        rate = sum(step.tokens for step in steps) / seconds
        for step, summed, norm in zip(steps, losses, norms, strict=True):
            loss = summed / step.labels
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    hint = "lower train.learning_rate"
                    raise NumericsError(f"training: the {what} is {value} in {step.where}; {hint}")
            self.steps += 1
            self.labels += step.labels
            self.loss += loss * step.labels
            self.metrics.write(
                step=step.index,
                round=self.round_index,
                loss=loss,
                lr=step.learning_rate,
                grad_norm=norm,
                tokens=step.tokens,
                tokens_per_s=rate,
            )
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    @property
    def mean_loss(self) -> float | None:
        """Mean over the label tokens of the steps that were read, in nats; None without any."""
        return self.loss / self.labels if self.labels else None
