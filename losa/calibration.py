"""Streaming calibration: block by block, holding one block's hidden states per stream and nothing else.

Host memory is bounded by ``BlockStream.nbytes`` per stream (samples x length x hidden x bytes), whatever the
number of blocks; statistics live for one block; Grams take L n^2 floats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa.errors import ModelError, NumericsError
from losa.pruners.base import Statistic
from losa_kernels import gram
from losa_kernels.column_sweep import accumulate_hessian, complete_hessian


class _Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


@dataclass(frozen=True)
class _Call:
    """Everything a block is called with besides its hidden states."""

    args: tuple
    kwargs: dict
    hidden_keyword: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        if self.hidden_keyword is None:
            output = block(hidden, *self.args, **self.kwargs)
        else:
            output = block(*self.args, **{self.hidden_keyword: hidden}, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def _split_call(args: tuple, kwargs: dict) -> tuple[Tensor, _Call]:
    if args:
        return args[0], _Call(tuple(args[1:]), dict(kwargs), None)
    if "hidden_states" not in kwargs:
        raise ModelError(f"decoder block: expected hidden states as first argument, got keywords {sorted(kwargs)}")
    rest = dict(kwargs)
    return rest.pop("hidden_states"), _Call((), rest, "hidden_states")


def _same(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, Tensor) == isinstance(b, Tensor)


class BlockStream:
    """Hidden states of all calibration samples at one depth of the model.

    Args:
        model: a causal LM; ``blocks``: its decoder blocks.
        input_ids: (samples, length) int64.
        batch_size: samples per block call.
        storage: device where hidden states wait between blocks; default: host memory.
        calls: kept by the caller between streams of one model: what blocks are called with, by batch shape, which
            takes a whole forward pass to find out.

    Raises:
        ModelError: a block's other arguments depend on the tokens, so that they cannot be replayed.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        input_ids: Tensor,
        batch_size: int = 1,
        storage: torch.device | str = "cpu",
        calls: dict[tuple[int, int], list[_Call]] | None = None,
    ):
        self.blocks = blocks
        self.device = next(blocks.parameters()).device
        self.storage = torch.device(storage)
        self.hidden: list[Tensor] = []
        self.position = ""
        self._calls = {} if calls is None else calls
        batches = input_ids.split(batch_size)
        with torch.no_grad():
            for batch in batches:
                if tuple(batch.shape) not in self._calls:
                    self._calls[tuple(batch.shape)] = self._capture_all(model, batch)
                self.hidden.append(self._capture_first(model, batch).to(self.storage))

    def _capture_all(self, model, batch: Tensor) -> list[_Call]:
        """One whole forward pass per batch shape: sliding-window models give each block arguments of its own."""
        calls: dict[int, _Call] = {}

        def record(index):
            def hook(_module, args, kwargs):
                calls[index] = _split_call(args, kwargs)[1]

            return hook

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_pre_hook(record(index), with_kwargs=True).remove)
            model.base_model(batch.to(self.device), use_cache=False)
        missing = [i for i in range(len(self.blocks)) if i not in calls]
        if missing:
            raise ModelError(f"blocks {missing} are not reached by a forward pass")
        return [calls[i] for i in range(len(self.blocks))]

    def _capture_first(self, model, batch: Tensor) -> Tensor:
        seen = []

        def hook(_module, args, kwargs):
            seen.append(_split_call(args, kwargs))
            raise _Stop

        handle = self.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            model.base_model(batch.to(self.device), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        hidden, call = seen[0]
        known = self._calls[tuple(batch.shape)][0]
        if not (_same(call.args, known.args) and _same(call.kwargs, known.kwargs)):
            raise ModelError("decoder block: arguments besides hidden states depend on the tokens; cannot be replayed")
        return hidden

    @property
    def nbytes(self) -> int:
        """Bytes of hidden states held."""
        return sum(h.numel() * h.element_size() for h in self.hidden)

    def __len__(self) -> int:
        return len(self.hidden)

    def run(self, index: int) -> Iterator[Tensor]:
        """Yield block ``index``'s output for each batch, (batch, length, hidden), on the model's device."""
        start = 0
        for hidden in self.hidden:
            call = self._calls[tuple(hidden.shape[:2])][index]
            self.position = f"samples {start}..{start + len(hidden) - 1}"
            start += len(hidden)
            yield call.run(self.blocks[index], hidden.to(self.device, non_blocking=True))

    def advance(self, index: int) -> None:
        """Replace every hidden state by block ``index``'s output, batch by batch."""
        for position, output in enumerate(self.run(index)):
            self.hidden[position] = output.to(self.storage)

    def gram(self, slice_features: int = 1 << 22) -> Tensor:
        """Centred Gram (samples, samples) fp32 of the present hidden states, a sample's features being all its
        positions and channels (Eq. 6). ``slice_features`` bounds the copy that brings all samples together."""
        flat = [h.flatten(1) for h in self.hidden]
        samples = sum(len(f) for f in flat)
        width = max(1, slice_features // samples)
        out = None
        for start in range(0, flat[0].shape[1], width):
            features = torch.cat([f[:, start : start + width] for f in flat]).to(self.device)
            out = gram(features, out=out)
        return out


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


class ErrorMeter:
    """Reconstruction error between a dense and a sparse block output, accumulated over batches.

    ``relative``: 1/H sum_c ||(D - S)_c||^2 / ||D_c||^2 over channels c, as the paper's code weighs it (E_l of Eq. 7).
    ``frobenius``: ||D - S||_F, Eq. 1's own.
    """

    def __init__(self, hidden_size: int, kind: str = "relative"):
        self.kind = kind
        self.difference = torch.zeros(hidden_size, dtype=torch.float64)
        self.reference = torch.zeros(hidden_size, dtype=torch.float64)

    def update(self, dense: Tensor, sparse: Tensor) -> None:
        dense, sparse = dense.flatten(0, -2).float(), sparse.flatten(0, -2).float()
        self.difference += (dense - sparse).square().sum(0).cpu()
        self.reference += dense.square().sum(0).cpu()

    def result(self) -> float:
        if self.kind == "frobenius":
            return self.difference.sum().sqrt().item()
        alive = self.reference > 0
        return (self.difference[alive] / self.reference[alive]).sum().item() / len(self.reference)
