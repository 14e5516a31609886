"""What pruning methods need to know of a linear's inputs, collected while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from losa.errors import ModelError, NumericsError
from losa.pruners.base import Statistic
from losa_kernels.pruning import accumulate_hessian, complete_hessian


class _InputNorms:
    """||X_j||_2 per input column; squares in fp32, summed over batches in fp64."""

    def __init__(self, in_features: int, device):
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(0)
        self.total += squares
        return squares

    def result(self) -> Tensor:
        return self.total.sqrt().float()


class _Hessian:
    """X^T X, (in, in) fp32."""

    def __init__(self, in_features: int, device):
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> Tensor:
        accumulate_hessian(self.total, x)
        return self.total.diagonal()

    def result(self) -> Tensor:
        return complete_hessian(self.total)


_COLLECTORS: dict[Statistic, type] = {"input_norms": _InputNorms, "hessian": _Hessian}


@contextmanager
def collect(
    linears: Mapping[str, nn.Module], statistic: Statistic, where: str, current_sample: Callable[[], str]
) -> Iterator[dict[str, Tensor | None]]:
    """Collect ``statistic`` of every linear's input while the body runs; the yielded dict is filled at its end.

    Linears fed by the very same tensor (q, k, v; gate, up) share one statistic. A linear that saw no token
    (an expert no router chose) gets None.

    Raises:
        NumericsError: a statistic became non-finite; names block, linear and sample.
    """
    results: dict[str, Tensor | None] = dict.fromkeys(linears)
    if statistic == "none":
        yield results
        return
    collectors: dict[str, object] = {}
    leader: dict[str, str] = {}
    inputs: list[tuple[Tensor, str]] = []
    sample = None

    def hook_for(name):
        def hook(module, args):
            nonlocal sample
            x = args[0]
            if current_sample() != sample:
                sample = current_sample()
                inputs.clear()
            shared = next((first for tensor, first in inputs if tensor is x), None)
            if shared is not None and leader.get(name, shared) == shared and name not in collectors:
                leader[name] = shared
                return
            if name in leader:
                raise ModelError(f"{where}.{name}: shares its input with {leader[name]} in some batches only")
            inputs.append((x, name))
            if x.numel() == 0:
                return
            if name not in collectors:
                collectors[name] = _COLLECTORS[statistic](module.in_features, x.device)
            probe = collectors[name].update(x.detach().reshape(-1, x.shape[-1]))
            if not torch.isfinite(probe).all():
                raise NumericsError(f"calibration: non-finite input of {where}.{name} at {sample}")

        return hook

    with ExitStack() as stack:
        for name, module in linears.items():
            stack.callback(module.register_forward_pre_hook(hook_for(name)).remove)
        yield results
    inputs.clear()
    finished = {name: collector.result() for name, collector in collectors.items()}
    for name in linears:
        results[name] = finished.get(leader.get(name, name))
