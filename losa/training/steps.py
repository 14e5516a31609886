"""The numbers of optimiser steps: they stay on the device until they are written down."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from losa.errors import NumericsError
from losa.training.metrics import Metrics
from losa.training.position import Position
from losa.training.throughput import Throughput


def moment(device: torch.device) -> Any:
    """A point in a device's work, for ``seconds_between``. On CUDA the host waits for nothing: the point is where the
    stream stands then."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(began: Any, ended: Any) -> float:
    """Seconds from one ``moment`` to a later one of the same device. The device must have reached both."""
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000


@dataclass(frozen=True)
class Step:
    """One optimiser step whose numbers nobody has read yet.

    ``index``: over all rounds, from 1. ``where``: for messages. ``weight``: tokens over all processes that the loss is
    a mean over. ``labels``, ``tokens``: label tokens and input tokens over all processes. ``losses``: the loss times
    ``weight``, and with ``train.distill`` the next-token loss summed over the labels, (1,) or (2,). ``norm``: scalar
    tensor, the gradient's norm before clipping. ``began``, ``ended``: of ``moment``.
    """

    index: int
    where: str
    weight: int
    labels: int
    tokens: int
    learning_rate: float
    losses: Tensor
    norm: Tensor
    began: Any
    ended: Any


@dataclass
class StepLog:
    """The steps of a round, in order: a context, at whose end all of them are written down. Only reading waits for the
    device.

    Args:
        metrics: gets a line per step.
        bar: shows the newest loss that was read.
        together: steps that are read at a time.
        throughput: makes speeds of tokens and seconds.
    """

    round_index: int
    metrics: Metrics
    bar: tqdm
    together: int = 1
    throughput: Throughput = Throughput()
    steps: int = 0
    weight: int = 0
    loss: float = 0.0
    labels: int = 0
    label_loss: float = 0.0
    _unread: list[Step] = field(default_factory=list)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.read()
            return
        # Ctrl-C, or a step that failed: the steps before it have their lines. An error of reading would hide the first.
        with suppress(Exception):
            self.read()

    def add(self, step: Step) -> None:
        self._unread.append(step)
        if len(self._unread) >= self.together:
            self.read()

    def read(self) -> None:
        """Fetch the numbers of all steps since the last call and write them down.

        Raises:
            NumericsError: a non-finite loss or gradient norm; names the first step that has one. The steps before it
                are written down.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return
        numbers = torch.stack([torch.cat([step.losses, step.norm[None]]) for step in steps]).tolist()
        for step, (summed, *told, norm) in zip(steps, numbers, strict=True):
            loss = summed / step.weight
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    hint = "lower train.learning_rate"
                    raise NumericsError(f"training: the {what} is {value} in {step.where}; {hint}")
            self.steps += 1
            self.weight += step.weight
            self.loss += loss * step.weight
            label_loss = {}
            if told and step.labels:
                self.labels += step.labels
                self.label_loss += told[0]
                label_loss = {"label_loss": told[0] / step.labels}
            self.metrics.write(
                step=step.index,
                round=self.round_index,
                loss=loss,
                **label_loss,
                lr=step.learning_rate,
                grad_norm=norm,
                tokens=step.tokens,
                **self.throughput.measures(step.tokens, seconds_between(step.began, step.ended)),
            )
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def go_on(self, position: Position) -> None:
        """Begin with the sums of a round that was interrupted."""
        self.steps, self.weight, self.loss = position.steps, position.weight, position.loss
        self.labels, self.label_loss = position.labels, position.label_loss

    def position(self, step: int, seconds: float) -> Position:
        """The sums after ``step`` steps of the round; all of them are read. Raises what ``read`` raises."""
        self.read()
        return Position(step, self.steps, self.weight, self.loss, seconds, self.labels, self.label_loss)

    @property
    def mean_loss(self) -> float | None:
        """Mean over the tokens that the steps weigh by, of the steps that were read; None without any."""
        return self.loss / self.weight if self.weight else None

    @property
    def mean_label_loss(self) -> float | None:
        """Mean over the label tokens where the loss is another; None where it is not."""
        return self.label_loss / self.labels if self.labels else None
