"""Pruners, statistics and an importance as a user may register them."""

from __future__ import annotations

import torch

from losa.algorithm.importance import register_importance
from losa.algorithm.statistics import Statistic, register_statistic
from losa.errors import NumericsError
from losa.pruners import Pruned, Pruner, register
from losa_kernels import pack_mask, wanda_mask


@register_statistic("input_maxima")
class InputMaxima(Statistic):
    reduction = "max"

    def __init__(self, in_features, device):
        self.total = torch.zeros(in_features, device=device)

    def update(self, x):
        self.total = torch.maximum(self.total, x.abs().amax(0))
        return self.total

    def result(self):
        return self.total

    @staticmethod
    def flat(in_features, device):
        return torch.ones(in_features, device=device)


@register("by-maxima")
class ByMaxima(Pruner):
    """Of whole blocks, in an order of its own."""

    statistic = "input_maxima"

    def prune_block(self, weights, statistics, pattern, masks):
        for name in reversed(list(weights)):
            yield name, Pruned(wanda_mask(weights[name], statistics[name], mask=masks[name], **pattern.as_kwargs()))


@register("failing")
class Failing(Pruner):
    def prune(self, weight, statistic, pattern, mask):
        if weight.shape == (64, 32):
            raise NumericsError("too wide")
        return Pruned(pack_mask(torch.ones(weight.shape, dtype=torch.bool)))


@register("unsummed")
class Unsummed(Pruner):
    statistic = "unsummed"

    def prune(self, weight, statistic, pattern, mask):
        raise AssertionError


@register_statistic("unsummed")
class WithoutTotal(InputMaxima):
    def __init__(self, in_features, device):
        super().__init__(in_features, device)
        self.largest = self.__dict__.pop("total")

    def update(self, x):
        return x


@register_importance("norms", needs="linears")
def norms(linears):
    """In a sharded model it is a DTensor, as its parameters are."""
    return torch.stack([each["mlp.up_proj"].weight.norm() for each in linears])
