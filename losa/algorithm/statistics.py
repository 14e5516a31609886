"""What pruning methods need to know of a linear's inputs, collected while a block runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from losa.errors import ModelError, NumericsError
from losa.modules.masked_lora import MaskedLoRALinear
from losa.registry import Registry
from losa_kernels.pruning import accumulate_hessian, complete_hessian

Linear = nn.Linear | MaskedLoRALinear


class Statistic(ABC):
    """One statistic of all inputs of a linear; the class is built for every input that linears do not share.

    Args:
        in_features: columns of the inputs.
        device: of the inputs.

    ``needs_backward``: whether it takes gradients. Calibration makes forward passes alone, so that the engine refuses
    such a statistic.
    """

    needs_backward: bool = False

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


_S = TypeVar("_S", bound=Statistic)
_REGISTRY: Registry[type[Statistic]] = Registry("statistic")


def register_statistic(name: str) -> Callable[[type[_S]], type[_S]]:
    """Let pruners name a class as their ``statistic``: a decorator of the class.

    Raises:
        ValueError: no subclass of ``Statistic``, or the name belongs to another class.
    """

    def add(statistic: type[_S]) -> type[_S]:
        if not (isinstance(statistic, type) and issubclass(statistic, Statistic)):
            raise ValueError(f"statistic {name!r}: expected a subclass of Statistic, got {statistic!r}")
        _REGISTRY.register(name, statistic)
        return statistic

    return add


def get_statistic(name: str) -> type[Statistic]:
    """What a pruner names. Raises ValueError for an unknown name, listing the known ones."""
    if name not in _REGISTRY:
        raise ValueError(f"statistic: unknown {name!r}; expected one of {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


register_statistic("input_norms")(InputNorms)
register_statistic("hessian")(Hessian)


@contextmanager
def collect(
    linears: Mapping[str, Linear], statistic: type[Statistic], where: str, current_sample: Callable[[], str]
) -> Iterator[dict[str, Tensor]]:
    """Collect ``statistic`` of every linear's input while the body runs; the yielded dict is filled at its end.

    Linears that are fed by the very same tensor (q, k, v; gate, up) share one statistic. Linears that saw no token
    share a flat one, if they are of one width.

    Raises:
        NumericsError: a statistic became non-finite; names block, linear and sample.
        ModelError: linears share their input in some batches only.
    """
    results: dict[str, Tensor] = {}
    inputs = _SharedInputs(statistic, where, current_sample)
    with ExitStack() as stack:
        for name, module in linears.items():
            stack.callback(module.register_forward_pre_hook(partial(inputs.see, name)).remove)
        yield results
    results |= inputs.results(linears)


class _SharedInputs:
    """Which linears are fed by the very same tensors, and the statistic of each such tensor."""

    def __init__(self, statistic: type[Statistic], where: str, current_sample: Callable[[], str]):
        self._statistic, self._where, self._current_sample = statistic, where, current_sample
        self._collected: dict[str, Statistic] = {}
        # By name of a linear: the first linear that was fed the same input.
        self._leader: dict[str, str] = {}
        # Inputs of the present batch, and the linear that was fed first by each of them.
        self._inputs: list[tuple[Tensor, str]] = []
        self._sample: str | None = None

    def see(self, name: str, module: Linear, args: tuple) -> None:
        """A forward pre-hook of the linear ``name``."""
        x = args[0]
        if self._current_sample() != self._sample:
            self._sample = self._current_sample()
            self._inputs.clear()
        first = next((first for tensor, first in self._inputs if tensor is x), None)
        if first is not None and self._leader.get(name, first) == first and name not in self._collected:
            self._leader[name] = first
            return
        if name in self._leader:
            raise ModelError(f"{self._where}.{name}: shares its input with {self._leader[name]} in some batches only")
        self._inputs.append((x, name))
        if x.numel() == 0:
            return
        if name not in self._collected:
            self._collected[name] = self._statistic(module.in_features, x.device)
        probe = self._collected[name].update(x.detach().reshape(-1, x.shape[-1]))
        if not torch.isfinite(probe).all():
            raise NumericsError(f"calibration: non-finite input of {self._where}.{name} at {self._sample}")

    def results(self, linears: Mapping[str, Linear]) -> dict[str, Tensor]:
        """By linear, in their order."""
        self._inputs.clear()
        finished = {name: collected.result() for name, collected in self._collected.items()}
        flat: dict[tuple[int, torch.device], Tensor] = {}
        results = {}
        for name, module in linears.items():
            found = finished.get(self._leader.get(name, name))
            if found is None:
                key = module.in_features, module.weight.device
                if key not in flat:
                    flat[key] = self._statistic.flat(*key)
                found = flat[key]
            results[name] = found
        return results
