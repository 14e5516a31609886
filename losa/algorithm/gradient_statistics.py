"""What pruning methods need to know of the gradients of a linear's weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor


class GradientStatistic(ABC):
    """One statistic of a linear's gradients, of which each calibration sample gives one; the class is built for every
    linear.

    A gradient is of a sample's loss, the mean over its predicted tokens in nats, with respect to the effective weight
    M * (W + s B A), at pruned entries too.

    Args:
        out_features: rows of a gradient.
        in_features: columns of a gradient.
        device: where ``total`` waits: the model's, or the host where statistics of all linears do not fit beside the
            model.

    ``total``: the tensor that ``update`` changes, for runs on several processes, as ``Statistic`` has it.
    """

    total: Tensor
    reduction: ClassVar[Literal["sum", "max"]] = "sum"

    @abstractmethod
    def __init__(self, out_features: int, in_features: int, device: torch.device): ...

    @abstractmethod
    def update(self, gradient: Tensor) -> None:
        """Take in the gradient of one sample, (out, in) fp32 on the model's device. Its memory may be written to."""

    @abstractmethod
    def result(self) -> Tensor:
        """The statistic of all samples so far, made of ``total``, which is on the model's device now."""


class GradientNorms(GradientStatistic):
    """sqrt(sum over samples (100 g)^2) of every entry, (out, in) fp32: G of Pruner-Zero (Dong et al. 2024)."""

    def __init__(self, out_features: int, in_features: int, device: torch.device):
        self.total = torch.zeros(out_features, in_features, device=device)

    def update(self, gradient: Tensor) -> None:
        gradient = gradient.to(self.total.device)
        self.total.addcmul_(gradient, gradient, value=100**2)

    def result(self) -> Tensor:
        return self.total.sqrt()


class GradientSums(GradientStatistic):
    """The sum over samples of g, (out, in) fp32."""

    def __init__(self, out_features: int, in_features: int, device: torch.device):
        self.total = torch.zeros(out_features, in_features, device=device)

    def update(self, gradient: Tensor) -> None:
        self.total += gradient.to(self.total.device)

    def result(self) -> Tensor:
        return self.total
