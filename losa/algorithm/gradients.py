"""Gradients of the loss with respect to the effective weights of all wrapped linears, from calibration samples.

Each sample's g = dY^T x is formed in its backward pass, handed to the statistics and dropped: no weight has a
``.grad``, and what is held is a statistic of every linear beside the activations of one sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from losa.algorithm.backward import pass_backward
from losa.algorithm.gradient_statistics import GradientStatistic, GradientSums
from losa.algorithm.statistics import statistic_of
from losa.distributed.collectives import reduce_to_process
from losa.distributed.processes import process_index
from losa.distributed.sharding import device_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners.base import Pruner
from losa.recipe.rates import takes_backward
from losa.recipe.sections import AllocationConfig, PruneConfig
from losa_kernels.cuda_memory import free_bytes

REGROWTH = "prune.regrow_by: gradient"
DEVICE_SHARE = 0.5  # of the device's free memory that the statistics of all linears may take


def wanted_gradients(prune: PruneConfig, pruner: Pruner) -> dict[str, type[GradientStatistic]]:
    """The statistics of gradients that a recipe takes, by the setting that asks for them: the pruner's first. Raises
    RecipeError: the pruner's statistic is unknown."""
    wanted: dict[str, type[GradientStatistic]] = {}
    statistic = statistic_of(prune, pruner)
    if statistic is not None and issubclass(statistic, GradientStatistic):
        wanted[f"prune.pruner: {prune.pruner}"] = statistic
    if prune.regrow_by == "gradient":
        wanted[REGROWTH] = GradientSums
    return wanted


def needs_whole(prune: PruneConfig, allocation: AllocationConfig, pruner: Pruner) -> str | None:
    """The setting, if there is one, that takes gradients of the whole model: a sharded one does not give them. Raises
    RecipeError: the pruner's statistic is unknown."""
    settings = [*wanted_gradients(prune, pruner)]
    settings += [f"allocation.rates: {allocation.rates}"] if takes_backward(allocation.rates) else []
    return next(iter(settings), None)


def stay_on_device(size: int, free: int) -> bool:
    """Whether statistics of ``size`` bytes wait on a device with ``free`` bytes left, and not in host memory."""
    return size <= DEVICE_SHARE * free


class Gradients:
    """Statistics of the gradients of all linears. All processes make it together, each from a share of the samples,
    and take the statistics together.

    Args:
        model: a causal LM, whole in every process. It runs as it is: merged weights, no dropout in evaluation mode.
        linears: its wrapped linears by full name.
        input_ids: (samples, length) int64, of all processes.
        wanted: statistics by any key.

    Raises:
        Stopped: between samples, if a signal asks for it.
        NumericsError: a loss that is not finite; names the sample.
        ModelError: a linear's input is changed in place after it was read.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, MaskedLoRALinear],
        input_ids: Tensor,
        wanted: Mapping[str, type[GradientStatistic]],
    ):
        self._device = device_of(model)
        place = self._device
        size = 4 * len(wanted) * sum(linear.weight.numel() for linear in linears.values())
        if place.type == "cuda" and not stay_on_device(size, free_bytes(place)):
            place = torch.device("cpu")
        self._statistics = {
            (key, name): statistic(linear.out_features, linear.in_features, place)
            for key, statistic in wanted.items()
            for name, linear in linears.items()
        }
        self._wanted = list(wanted)
        self._scale = 1 / (input_ids.shape[1] - 1)
        # Of the present sample, what came of some calls of a linear that has more.
        self._parts: dict[str, Tensor] = {}
        pass_backward(model, linears, input_ids, self._see, self._update_rest)

    def _see(self, name: str, x: Tensor, grad_output: Tensor, left: int) -> None:
        # In fp32 products of 16-bit numbers are exact.
        gradient = (grad_output.float() * self._scale).T @ x.float()
        if name in self._parts:
            gradient += self._parts.pop(name)
        if left:
            self._parts[name] = gradient
        else:
            self._update(name, gradient)

    def _update_rest(self) -> None:
        """A call whose output nobody used has no gradient."""
        for name in list(self._parts):
            self._update(name, self._parts.pop(name))

    def _update(self, name: str, gradient: Tensor) -> None:
        *others, last = self._wanted
        for key in others:
            self._statistics[key, name].update(gradient.clone())
        self._statistics[last, name].update(gradient)

    def has(self, key: str) -> bool:
        """Whether ``key`` was wanted."""
        return key in self._wanted

    def of_block(self, key: str, block: str, owners: Mapping[str, int]) -> dict[str, Tensor]:
        """The statistic ``key`` over all processes' samples, of the linears that this process owns, on the model's
        device. It is given once; its memory here becomes free.

        Args:
            block: full name; owners: the process that owns each linear, by name within the block.
        """
        found = {}
        for name, owner in owners.items():
            statistic = self._statistics.pop((key, f"{block}.{name}"))
            statistic.total = statistic.total.to(self._device)
            reduce_to_process(statistic.total, owner, statistic.reduction)
            if owner == process_index():
                found[name] = statistic.result()
        return found
