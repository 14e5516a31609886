"""Where training stands between two optimiser steps, and going on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What AdamW keeps of a parameter.
_LIKE_PARAMETER, _COUNTER = ("exp_avg", "exp_avg_sq"), "step"


@dataclass(frozen=True)
class Position:
    """How far a round has come. All are plain numbers, so that ``vars`` of a position can be written as JSON.

    ``step``: optimiser steps of the round that are done, steps that had nothing to learn from among them. ``steps``:
    the other done steps; ``weight``: the tokens over all processes that their losses are means over (label tokens, with
    ``train.distill`` all tokens); ``loss``: summed over these tokens. ``seconds``: wall time of the round's training.
    ``labels``, ``label_loss``: with ``train.distill``, label tokens and the next-token loss summed over them.
    """

    step: int
    steps: int
    weight: int
    loss: float
    seconds: float
    labels: int = 0
    label_loss: float = 0.0


@dataclass(frozen=True)
class TrainState:
    """What a round goes on from, beside the model's parameters, and ``Trainer.global_step`` and
    ``Trainer.sequences_per_step``.

    ``moments``: AdamW's state of each parameter that has had a gradient, the optimiser's own tensors:
    ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` as the parameter (a DTensor with its placements, where it is one),
    ``NAME.step`` fp32 scalar, the same on all processes. NAME is the parameter's full name in the model. What the
    method's extension keeps of a parameter is there too (``losa.training.extension.Extension.state``).
    """

    position: Position
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class StepDone:
    """What ``after_step`` is given. All processes reach it at the same step.

    ``global_step``: optimiser steps over all rounds. ``state``: makes the state after this step. It waits for the
    device and writes the metrics of the steps so far; the tensors are not copied, and the next step changes them.
    NumericsError, OutputError: as of ``Trainer.train``.
    """

    global_step: int
    state: Callable[[], TrainState]


# Called after each optimiser step. An error that it raises, on all processes, ends the training.
AfterStep = Callable[[StepDone], None]


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by ``TrainState.moments``'s names."""
    return {
        f"{name}.{part}": optimizer.state[parameter][part]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for part in (*_LIKE_PARAMETER, _COUNTER)
    }


def empty_moments(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of these names, of ``TrainState.moments``, for a loader to fill: zeros, placed like the parameters. A
    part that AdamW does not keep is an extension's.

    Raises:
        KeyError: a name that the model's parameters do not account for.
    """
    parameters = dict(model.named_parameters())
    made: dict[str, Tensor] = {}
    for name in names:
        parameter, _, part = name.rpartition(".")
        like = parameters[parameter].detach()
        made[name] = torch.zeros((), dtype=torch.float32) if part == _COUNTER else torch.zeros_like(like)
    return made


def put_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor], fused: bool) -> None:
    """Give AdamW the state that ``moments_of`` took."""
    for name, parameter in model.named_parameters():
        if f"{name}.{_COUNTER}" in moments:
            state = {part: moments[f"{name}.{part}"] for part in _LIKE_PARAMETER}
            # The fused step counts on the parameter's device, the plain step on the host.
            counter = moments[f"{name}.{_COUNTER}"]
            optimizer.state[parameter] = {_COUNTER: counter.to(parameter.device if fused else "cpu"), **state}
