"""What pruning a linear is expected to cost in loss, to second order, by the diagonal of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa.algorithm.backward import pass_backward
from losa.algorithm.linear_rates import CURVE_ROWS, lowest_of_all, lowest_of_rows
from losa.algorithm.row_scales import bounded
from losa.distributed.collectives import from_rank_zero, sum_over_processes
from losa.distributed.sharding import device_of
from losa.modules.masked_lora import MaskedLoRALinear
from losa_kernels import unpack_mask


@dataclass(frozen=True)
class Energies:
    """Of a linear, fp64 on the host: ``inputs`` (in,), the mean of x_j^2 over the tokens that it has seen; ``outputs``
    (out,), the sum over these tokens of dL/dy_i squared, by all tokens, L the loss in nats summed over a sample.
    Labels are drawn from the model's own distribution, by which the Fisher matrix is defined.
    """

    inputs: Tensor
    outputs: Tensor


def energies_of(
    model: nn.Module, linears: Mapping[str, MaskedLoRALinear], input_ids: Tensor, seed: int
) -> dict[str, Energies]:
    """By linear's name. All processes call it together and get the same. Arguments and errors: of ``pass_backward``;
    ``seed``: of the labels."""
    device = device_of(model)
    sizes = {name: (1, linear.in_features, linear.out_features) for name, linear in linears.items()}
    # Of each linear: tokens seen, squared inputs, squared gradients.
    widths = [sum(each) for each in sizes.values()]
    sums = torch.zeros(sum(widths), dtype=torch.float64, device=device)
    parts = dict(zip(sizes, sums.split(widths), strict=True))

    def see(name: str, x: Tensor, grad_output: Tensor, left: int) -> None:
        tokens, inputs, outputs = parts[name].split(sizes[name])
        tokens += len(x)
        inputs += x.float().square().sum(0)
        outputs += grad_output.float().square().sum(0)

    pass_backward(model, linears, input_ids, see, label_seed=seed)
    total = from_rank_zero(sum_over_processes(sums)).cpu()
    found = {}
    for name, part in zip(sizes, total.split(widths), strict=True):
        tokens, inputs, outputs = part.split(sizes[name])
        found[name] = Energies(inputs / tokens.clamp_min(1), outputs / input_ids.numel())
    return found


def as_tensors(energies: Mapping[str, Energies]) -> dict[str, Tensor]:
    """The same by names of tensors, which a resume state can hold."""
    return {f"{name}.{part}": tensor for name, own in energies.items() for part, tensor in vars(own).items()}


def from_tensors(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Energies]:
    """What ``as_tensors`` took apart, of the linears of these names."""
    return {name: Energies(tensors[f"{name}.inputs"], tensors[f"{name}.outputs"]) for name in names}


def loss_curve(linear: MaskedLoRALinear, energies: Energies, nested: bool, by_rows: bool = False) -> Tensor:
    """How much the mean loss of a token is expected to grow with the k weights of each row gone that have the lowest
    Wanda scores, k = 0 to in: (in + 1,) fp64 on the host, convex, in nats.

    A pruned weight w_ij costs 1/2 w_ij^2 F_ij (LeCun et al. 1989, "Optimal Brain Damage"; with the Fisher matrix F,
    Theis et al. 2018). F_ij is E[(dL/dy_i)^2] E[x_j^2], as if gradients and inputs did not depend on each other
    (Martens and Grosse 2015). So the cost of a weight is its squared Wanda score times a factor of its row. Of a
    linear with many rows, the curve's shape is taken from evenly spaced ones, and its height from all.

    Args:
        linear: whose shape's energies they are.
        energies: of the linear.
        nested: what is pruned already goes first, and is in the curve from k = 0 on. The curve takes its k from every
            row, also where rows have lost different numbers and a pruner could take more from one than from another.
        by_rows: as many weights go, but those that cost least in the whole matrix, as ``ByRows`` compares its rows: by
            energies of outputs that are ``bounded``, in all of the curve.
    """
    step = -(-linear.out_features // CURVE_ROWS)
    outputs = bounded(energies.outputs) if by_rows else energies.outputs
    squares, inputs = linear.dense_weight().square_(), energies.inputs.float().to(linear.weight.device)
    height = 0.5 * (squares @ inputs).double().cpu() @ outputs
    kept = unpack_mask(linear.mask.detach()[::step], linear.in_features) if nested else None
    costs, own = squares[::step] * inputs, outputs[::step]
    curve = lowest_of_all(costs.mul_(own.to(costs)[:, None]), kept) if by_rows else lowest_of_rows(costs, kept, own)
    if curve[-1] <= 0:  # gradients reached none of these rows
        curve = torch.linspace(0, 1, linear.in_features + 1, dtype=torch.float64)
    return curve * (height / curve[-1])
