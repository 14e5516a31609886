"""Forward and backward passes over calibration samples, which show linears with the gradients of their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from losa.distributed.collectives import share_of
from losa.distributed.processes import process_count
from losa.distributed.sharding import device_of
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.turns import everywhere
from losa.distributed.watch import progress
from losa.errors import ModelError, NumericsError
from losa.modules.masked_lora import MaskedLoRALinear
from losa.training.loss import TokenLoss, label_positions

# Takes a linear's name, its inputs x (tokens, in), the gradient dY (tokens, out) of the loss summed over a sample's
# tokens, and how many calls of this linear in this sample have a gradient that has yet to come. Both are as the model
# computes them.
See = Callable[[str, Tensor, Tensor, int], None]


def pass_backward(
    model: nn.Module,
    linears: Mapping[str, MaskedLoRALinear],
    input_ids: Tensor,
    see: See,
    after_sample: Callable[[], object] = lambda: None,
    *,
    label_seed: int | None = None,
) -> None:
    """Run the model forward and backward on calibration samples, one at a time, without gradients of parameters. What
    is held beside the model is the activations of one sample. All processes call it together, each for a share of the
    samples.

    Args:
        model: a causal LM, whole in every process. It runs as it is, without dropout in evaluation mode.
        linears: its wrapped linears by full name.
        input_ids: (samples, length) int64, of all processes.
        see: called for each call of a linear, once its gradient is there.
        after_sample: called after each sample.
        label_seed: of labels that are drawn from the model's own distribution. None: the samples' next tokens.

    Raises:
        Stopped: between samples, if a signal asks for it.
        NumericsError: a loss that is not finite; names the sample.
        ModelError: a linear's input is changed in place after it was read.
    """
    mine = share_of(len(input_ids))
    most = -(-len(input_ids) // process_count())
    loss, device = everywhere(lambda: TokenLoss(model)), device_of(model)
    # Of the present sample: calls of each linear whose gradient has yet to come.
    calls: dict[str, int] = {}

    def run(index: int, ids: Tensor) -> None:
        if not len(ids):
            return
        ids = labels = ids.to(device)
        if label_seed is not None:
            # Of each sample by itself: it does not matter which process has it.
            # A CPU's generator takes 32 bits; an odd factor keeps seeds apart in them.
            seed = (label_seed * 0x9E3779B1 + index) % 2**32
            labels = loss.drawn_labels(ids, torch.Generator(device).manual_seed(seed))
        # The sum over tokens: gradients of their mean would underflow in fp16.
        total = loss(ids, *label_positions(labels))
        if not math.isfinite(total.item()):
            raise NumericsError(f"calibration: the loss is {total.item()} at sample {index}")
        total.backward()
        after_sample()
        calls.clear()

    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(_frozen(model))
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(_watch, name, calls, see)).remove)
        for step in range(most):
            progress(f"gradients, sample {step + 1} of {most}")
            check()
            samples = mine[step : step + 1]
            together(partial(run, samples.start, input_ids[samples.start : samples.stop]))


def _watch(name: str, calls: dict[str, int], see: See, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook of the linear ``name``: its output, whose gradient will be seen."""
    if not torch.is_grad_enabled():  # labels are drawn
        return output
    x = args[0].detach()
    if not output.requires_grad:
        # Nothing before this linear needs a gradient, so that the backward pass ends here. A leaf could not be changed
        # in place, as decoder blocks may do.
        output = output.detach().requires_grad_().clone()
    calls[name] = calls.get(name, 0) + 1
    version = x._version

    def seen(gradient: Tensor) -> None:
        if x._version != version:
            raise ModelError(f"{name}: its input is changed in place, so that its gradient cannot be formed later")
        calls[name] -= 1
        see(name, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]), calls[name])

    output.register_hook(seen)
    return output


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
