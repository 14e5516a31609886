"""What pruning methods need to know of a linear's inputs, collected while a block runs; and all statistics by name."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from losa.algorithm.gradient_statistics import GradientNorms, GradientStatistic, GradientSums
from losa.distributed.collectives import reduce_to_process
from losa.distributed.processes import process_count, process_index
from losa.distributed.together import together
from losa.errors import ModelError, NumericsError, RecipeError
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners.base import Pruner
from losa.recipe.sections import PruneConfig
from losa.registry import Registry
from losa_kernels.pruning import accumulate_hessian, complete_hessian

Linear = nn.Linear | MaskedLoRALinear


class Statistic(ABC):
    """One statistic of all inputs of a linear; the class is built for every input that linears do not share.

    Args:
        in_features: columns of the inputs.
        device: of the inputs.

    ``total``: the tensor that ``update`` changes, for runs on several processes. Each process sees some of the inputs.
    The totals of all processes are reduced into one, in place, before ``result`` is asked for: entry by entry they are
    summed, or the largest is taken where ``reduction`` is "max". So ``total`` is made in ``__init__``, is contiguous,
    and has one shape and dtype whatever was seen.
    """

    total: Tensor
    reduction: ClassVar[Literal["sum", "max"]] = "sum"

    @abstractmethod
    def __init__(self, in_features: int, device: torch.device): ...

    @abstractmethod
    def update(self, x: Tensor) -> Tensor:
        """Take inputs x (tokens, in) in. Returns a small tensor that is finite only if x is."""

    @abstractmethod
    def result(self) -> Tensor:
        """The statistic of all inputs so far."""

    @staticmethod
    @abstractmethod
    def flat(in_features: int, device: torch.device) -> Tensor:
        """What stands for ``result`` where no token was seen (an expert that no router chose): equal inputs, so that
        the weights' magnitudes decide."""


class InputNorms(Statistic):
    """||X_j||_2 per input column, (in,) fp32; squares in fp32, summed over batches in fp64."""

    def __init__(self, in_features: int, device: torch.device):
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(0)
        self.total += squares
        return squares

    def result(self) -> Tensor:
        return self.total.sqrt().float()

    @staticmethod
    def flat(in_features: int, device: torch.device) -> Tensor:
        return torch.ones(in_features, device=device)


class Hessian(Statistic):
    """X^T X, (in, in) fp32."""

    def __init__(self, in_features: int, device: torch.device):
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> Tensor:
        accumulate_hessian(self.total, x)
        return self.total.diagonal()

    def result(self) -> Tensor:
        return complete_hessian(self.total)

    @staticmethod
    def flat(in_features: int, device: torch.device) -> Tensor:
        return torch.eye(in_features, device=device)


_S = TypeVar("_S", bound=type[Statistic] | type[GradientStatistic])
_REGISTRY: Registry[type[Statistic] | type[GradientStatistic]] = Registry("statistic")


def register_statistic(name: str) -> Callable[[_S], _S]:
    """Let pruners name a class as their ``statistic``: a decorator of the class.

    Raises:
        ValueError: no subclass of ``Statistic`` or ``GradientStatistic``, or the name belongs to another class.
    """

    def add(statistic: _S) -> _S:
        if not (isinstance(statistic, type) and issubclass(statistic, (Statistic, GradientStatistic))):
            expected = "a subclass of Statistic or GradientStatistic"
            raise ValueError(f"statistic {name!r}: expected {expected}, got {statistic!r}")
        _REGISTRY.register(name, statistic)
        return statistic

    return add


def get_statistic(name: str) -> type[Statistic] | type[GradientStatistic]:
    """What a pruner names. Raises ValueError for an unknown name, listing the known ones."""
    if name not in _REGISTRY:
        raise ValueError(f"statistic: unknown {name!r}; expected one of {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def statistic_of(prune: PruneConfig, pruner: Pruner) -> type[Statistic] | type[GradientStatistic] | None:
    """What the recipe's pruner names. Raises RecipeError for an unknown name, listing the known ones."""
    try:
        return None if pruner.statistic is None else get_statistic(pruner.statistic)
    except ValueError as error:
        raise RecipeError(f"prune.pruner: {prune.pruner!r}: {error}") from error


def check_total(prune: PruneConfig, pruner: Pruner, statistic: type[Statistic] | type[GradientStatistic]) -> None:
    """Raises RecipeError for a statistic that processes cannot add up."""
    one = torch.device("cpu")
    made = statistic(1, 1, one) if issubclass(statistic, GradientStatistic) else statistic(1, one)
    if not isinstance(getattr(made, "total", None), Tensor):
        raise RecipeError(
            f"prune.pruner: {prune.pruner!r}: its statistic {pruner.statistic!r} makes no tensor `total` in __init__, "
            "which several processes add up"
        )


register_statistic("input_norms")(InputNorms)
register_statistic("hessian")(Hessian)
register_statistic("gradient_norms")(GradientNorms)
register_statistic("gradient_sums")(GradientSums)


@dataclass(frozen=True)
class Collected:
    """``statistics``: of the inputs of all processes, by name of the linears that this process owns. ``owners``: of
    every linear. ``tokens``: how many tokens every linear saw, in all processes."""

    statistics: dict[str, Tensor]
    owners: dict[str, int]
    tokens: dict[str, int]


def collect(
    linears: Mapping[str, Linear],
    statistic: type[Statistic],
    where: str,
    current_sample: Callable[[], str],
    run: Callable[[], object],
    owners_of: Callable[[list[list[str]]], dict[str, int]],
) -> Collected:
    """``statistic`` of every linear's input while ``run`` runs the linears.

    Linears that are fed by the very same tensor (q, k, v; gate, up) share one statistic. Linears that saw no token
    share a flat one, if they are of one width. Several processes call this together, each with samples of its own or
    none.

    Args:
        linears: by name.
        where: what their names are within, for messages.
        current_sample: says which samples are running.
        run: makes no collective calls.
        owners_of: says which process gets the statistic of each linear, from the names of the linears that share one.

    Raises:
        NumericsError: a statistic became non-finite; names block, linear and sample.
        ModelError: linears share their input in some batches only.
    """
    inputs = _SharedInputs(statistic, where, current_sample)
    everyone = together(lambda: inputs.see_all(linears, run))
    groups = _groups(linears, everyone, where)
    owners = owners_of([group.names for group in groups])
    found: dict[str, Tensor] = {}
    for group in groups:
        owner = owners[group.names[0]]
        result = inputs.result(group, linears[group.names[0]], owner)
        if result is not None:
            found |= dict.fromkeys(group.names, result)
    tokens = {
        name: 0 if group.leader is None else sum(seen.tokens.get(group.leader, 0) for seen in everyone)
        for group in groups
        for name in group.names
    }
    return Collected({name: found[name] for name in linears if name in found}, owners, tokens)


def fed_together(
    linears: Mapping[str, Linear], where: str, current_sample: Callable[[], str], run: Callable[[], object]
) -> list[list[str]]:
    """Names of linears that are fed by the very same tensor, in the order of ``linears``, which all processes call
    together. A linear that sees no token is alone. Arguments and errors: as of ``collect``."""
    inputs = _SharedInputs(_Unread, where, current_sample)
    groups = _groups(linears, together(lambda: inputs.see_all(linears, run)), where)
    found = [[group.names] if group.leader is not None else [[name] for name in group.names] for group in groups]
    return sorted((names for parts in found for names in parts), key=lambda names: list(linears).index(names[0]))


class _Unread(Statistic):
    """What is taken of inputs where only their identity matters."""

    def __init__(self, in_features: int, device: torch.device):
        self.total = torch.zeros(0, device=device)

    def update(self, x: Tensor) -> Tensor:
        return self.total

    def result(self) -> Tensor:
        return self.total

    @staticmethod
    def flat(in_features: int, device: torch.device) -> Tensor:
        return torch.zeros(0, device=device)


@dataclass(frozen=True)
class _Seen:
    """What a process saw: ``leaders``, by name of a linear the first linear that was fed the same input; ``tokens``, by
    name of the linears that have a statistic of their own."""

    leaders: dict[str, str]
    tokens: dict[str, int]


@dataclass(frozen=True)
class _Group:
    """Linears that share a statistic: that of the linear ``leader``, or a flat one (None)."""

    leader: str | None
    names: list[str]


def _groups(linears: Mapping[str, Linear], everyone: Iterable[_Seen], where: str) -> list[_Group]:
    """Which linears share their statistic, from what all processes saw."""
    leaders: dict[str, str] = {}
    names: set[str] = set()
    for seen in everyone:
        for name, leader in seen.leaders.items():
            if leaders.setdefault(name, leader) != leader:
                raise _shared_in_some(where, name, leader)
        names |= seen.tokens.keys()
    groups: dict[object, _Group] = {}
    for name, module in linears.items():
        if name in names and name in leaders:
            raise _shared_in_some(where, name, leaders[name])
        leader = leaders.get(name, name)
        known = leader in names
        key = leader if known else (module.in_features, module.weight.device)
        groups.setdefault(key, _Group(leader if known else None, [])).names.append(name)
    return list(groups.values())


def _shared_in_some(where: str, name: str, leader: str) -> ModelError:
    return ModelError(f"{where}.{name}: shares its input with {leader} in some batches only")


class _SharedInputs:
    """Which linears are fed by the very same tensors, and the statistic of each such tensor."""

    def __init__(self, statistic: type[Statistic], where: str, current_sample: Callable[[], str]):
        self._statistic, self._where, self._current_sample = statistic, where, current_sample
        self._collected: dict[str, Statistic] = {}
        self._tokens: dict[str, int] = {}
        # By name of a linear: the first linear that was fed the same input.
        self._leader: dict[str, str] = {}
        # Inputs of the present batch that are still there, and the linear that was fed first by each of them.
        self._inputs: list[tuple[weakref.ref[Tensor], str]] = []
        self._sample: str | None = None

    def see(self, name: str, module: Linear, args: tuple) -> None:
        """A forward pre-hook of the linear ``name``."""
        x = args[0]
        if self._current_sample() != self._sample:
            self._sample = self._current_sample()
            self._inputs.clear()
        self._inputs = [entry for entry in self._inputs if entry[0]() is not None]
        first = next((first for tensor, first in self._inputs if tensor() is x), None)
        if first is not None and self._leader.get(name, first) == first and name not in self._collected:
            self._leader[name] = first
            return
        if name in self._leader:
            raise _shared_in_some(self._where, name, self._leader[name])
        self._inputs.append((weakref.ref(x), name))
        if x.numel() == 0:
            return
        if name not in self._collected:
            self._collected[name] = self._statistic(module.in_features, x.device)
            self._tokens[name] = 0
        self._tokens[name] += x.numel() // x.shape[-1]
        probe = self._collected[name].update(x.detach().reshape(-1, x.shape[-1]))
        if not torch.isfinite(probe).all():
            raise NumericsError(f"calibration: non-finite input of {self._where}.{name} at {self._sample}")

    def see_all(self, linears: Mapping[str, Linear], run: Callable[[], object]) -> _Seen:
        """What the linears are fed while ``run`` runs them."""
        with ExitStack() as stack:
            for name, module in linears.items():
                stack.callback(module.register_forward_pre_hook(partial(self.see, name)).remove)
            run()
        self._inputs.clear()
        return _Seen(self._leader, self._tokens)

    def result(self, group: _Group, module: Linear, owner: int) -> Tensor | None:
        """The statistic of a group of linears, of which ``module`` is one, over all processes; None in processes that
        do not own it. All processes call this together."""
        width, device = module.in_features, module.weight.device
        mine = owner == process_index()
        if group.leader is None:
            return self._statistic.flat(width, device) if mine else None
        collected = self._collected.pop(group.leader, None)
        if collected is None:
            collected = self._statistic(width, device)
        if process_count() > 1:
            reduce_to_process(collected.total, owner, self._statistic.reduction)
        return collected.result() if mine else None
