"""Gradients of the loss with respect to the effective weights of all wrapped linears, from calibration samples.

One pass goes forward and backward through the whole model, a sample at a time. Hooks on the linears form
g = dY^T x of that sample, hand it to the statistics and drop it: no weight has a ``.grad``, and what is held is a
statistic of every linear beside the activations of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from losa.algorithm.gradient_statistics import GradientStatistic, GradientSums
from losa.algorithm.statistics import statistic_of
from losa.distributed.collectives import reduce_to_process, share_of
from losa.distributed.processes import process_count, process_index
from losa.distributed.sharding import device_of
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.turns import everywhere
from losa.distributed.watch import progress
from losa.errors import ModelError, NumericsError
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners.base import Pruner
from losa.recipe.sections import PruneConfig
from losa.training.loss import TokenLoss, label_positions
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
        self._linears = linears
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
        # Of the present sample: calls of each linear whose gradient has yet to come, and what came of other calls.
        self._calls: dict[str, int] = {}
        self._parts: dict[str, Tensor] = {}
        self._collect(model, input_ids)

    def _collect(self, model: nn.Module, input_ids: Tensor) -> None:
        mine = share_of(len(input_ids))
        most = -(-len(input_ids) // process_count())
        loss = everywhere(lambda: TokenLoss(model))
        self._scale = 1 / (input_ids.shape[1] - 1)
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(_frozen(model))
            for name, linear in self._linears.items():
                stack.callback(linear.register_forward_hook(partial(self._watch, name)).remove)
            for step in range(most):
                progress(f"gradients, sample {step + 1} of {most}")
                check()
                samples = mine[step : step + 1]
                together(partial(self._add, loss, input_ids[samples.start : samples.stop], samples.start))

    def _add(self, loss: TokenLoss, ids: Tensor, index: int) -> None:
        """Take in the sample ``index`` of all samples: ids (1, length), or none."""
        if not len(ids):
            return
        # The sum over tokens: gradients of their mean would underflow in fp16.
        total = loss(*(tensor.to(self._device) for tensor in (ids, *label_positions(ids))))
        if not math.isfinite(total.item()):
            raise NumericsError(f"calibration: the loss is {total.item()} at sample {index}")
        total.backward()
        for name in list(self._parts):
            self._update(name, self._parts.pop(name))
        self._calls.clear()

    def _watch(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A forward hook of the linear ``name``: its output, whose gradient will be seen."""
        x = args[0].detach()
        if not output.requires_grad:
            # Nothing before this linear needs a gradient, so that the backward pass ends here. A leaf could not be
            # changed in place, as decoder blocks may do.
            output = output.detach().requires_grad_().clone()
        self._calls[name] = self._calls.get(name, 0) + 1
        output.register_hook(partial(self._see, name, x, x._version))
        return output

    def _see(self, name: str, x: Tensor, version: int, grad_output: Tensor) -> None:
        if x._version != version:
            raise ModelError(f"{name}: its input is changed in place, so that its gradient cannot be formed later")
        columns, rows = x.shape[-1], grad_output.shape[-1]
        # In fp32 products of 16-bit numbers are exact.
        outputs = grad_output.reshape(-1, rows).float() * self._scale
        gradient = outputs.T @ x.reshape(-1, columns).float()
        self._calls[name] -= 1
        if name in self._parts:
            gradient += self._parts.pop(name)
        if self._calls[name]:
            self._parts[name] = gradient
        else:
            self._update(name, gradient)

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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters: the adapters' gradients would take two products more and memory of their own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
