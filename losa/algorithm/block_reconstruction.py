"""Block-wise reconstruction: a pruned block is trained by itself towards what the dense model's block puts out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from losa.algorithm.reconstruction import sum_of_all
from losa.algorithm.stream import BlockStream
from losa.distributed.collectives import from_rank_zero, sum_over_processes
from losa.distributed.together import together
from losa.distributed.watch import progress
from losa.errors import NumericsError
from losa.recipe.learning_rate import lr_factor
from losa.recipe.training import ReconstructConfig, TrainConfig
from losa.training.groups import parameter_groups

# Share of the steps in which the learning rate rises.
WARMUP = 0.1


@dataclass(frozen=True)
class Fit:
    """The loss of the first step's samples, ``before`` the first step and ``after`` the last one. They are equal where
    the loss did not fall: the block then is as it was."""

    before: float
    after: float


class BlockReconstruction:
    """Trains the parameters of a block that require a gradient, so that the block turns the sparse stream's input into
    the dense stream's output.

    With S the block's output for the sparse stream's input, D the dense stream's output, both (tokens, H), and r_t the
    root mean square of token t in D, which the next block's norm divides by, the loss of a batch is

        1/H sum over channels c of  mean over tokens t of ((S - D)_tc / r_t)^2  /  mean over tokens t of (D_tc / r_t)^2

    The second mean is over all calibration tokens. So all tokens and all channels count alike: massive activations,
    which a few tokens have in a few channels, decide neither over the other tokens nor over the other channels. A
    token or a channel that is zero in D does not count. The optimiser is AdamW with warm-up and linear decay, without
    weight decay. Adapters drop no inputs.

    Source: block-wise tuning after pruning (arXiv 2510.14444).

    Several processes take the steps that one process would take: a step's samples are drawn from the samples of all
    processes, each process computes its own ones, and gradients are summed. Then all processes take process 0's
    parameters.

    Args:
        config: the recipe's section.
        shape: of the calibration tokens of all processes, (samples, length).
        batch_size: most samples of a forward pass.
        train: the recipe's section, which has the factors on the learning rate of norms and of B; None: they are 1.
    """

    def __init__(
        self, config: ReconstructConfig, shape: Sequence[int], batch_size: int, train: TrainConfig | None = None
    ):
        self._config = config
        self._factors: dict[str, Any] = {} if train is None else {"lora_plus": train.lora_plus, "norms": train.norms}
        self._samples, self._length = shape
        self._batch = min(config.batch_size, self._samples)
        self._piece = min(self._batch, batch_size)

    @property
    def sizes(self) -> set[int]:
        """Sizes of the batches that a block is called with."""
        return {1, self._piece}

    def fit(self, name: str, index: int, sparse: BlockStream, dense: BlockStream, seed: int) -> Fit:
        """Train block ``index`` in place. All processes call it together, with the block whole in each.

        Args:
            name: the block's, for messages.
            sparse: stands before the block; its ``other_sizes`` are ``sizes``.
            dense: stands behind the block.
            seed: of the order of samples.

        Raises:
            NumericsError: the loss became non-finite; names the block.
        """
        steps = self._config.steps
        groups = parameter_groups(sparse.blocks[index], **self._factors)
        parameters = [parameter for group in groups for parameter in group["params"]]
        loss = _Loss(index, sparse, dense, self._channel_weights(dense))
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(groups, foreach=True)
        batches = list(islice(self._batches(seed), steps))
        values = []
        for step, batch in enumerate(batches):
            progress(f"reconstructing {name}, step {step + 1} of {steps}")
            with torch.enable_grad():
                values.append(self._evaluate(loss, batch, parameters))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * lr_factor(step, steps, WARMUP) * self._config.learning_rate
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            _copy(parameters, [from_rank_zero(p.detach()) for p in parameters])  # GPUs of two kinds round differently
            values.append(self._evaluate(loss, batches[0], []))
            fit = Fit(*from_rank_zero(torch.cat([values[0], values[-1]])).tolist())
            if not math.isfinite(fit.after):
                raise NumericsError(
                    f"{name}: reconstruction: its loss went from {fit.before:.3g} to {fit.after}; expected a finite "
                    "one, which a smaller reconstruct.learning_rate may give"
                )
            if fit.after >= fit.before:
                _copy(parameters, before)
                fit = Fit(fit.before, fit.before)
        # `gathered` keeps what autograd counts as written, and autograd does not count every kind of step.
        increment_version(parameters)
        return fit

    def _batches(self, seed: int) -> Iterator[list[int]]:
        """The samples of each step by their numbers, without end. Each random order of all samples is cut into full
        batches."""
        generator = torch.Generator().manual_seed(seed)
        full = self._samples // self._batch * self._batch
        while True:
            for batch in torch.randperm(self._samples, generator=generator)[:full].split(self._batch):
                yield batch.tolist()

    def _channel_weights(self, dense: BlockStream) -> Tensor:
        """What the squares of a channel's differences count, 1 / (H mean((D_tc / r_t)^2)): (H,) fp64."""
        sums = None
        for hidden in dense.hidden:
            rows = _wide(hidden.to(dense.device, non_blocking=True))
            squares = (rows.square() * _token_weights(rows)).sum((0, 1)).double()
            sums = squares if sums is None else sums + squares
        mean = sum_of_all(sums).to(dense.device) / (self._samples * self._length)
        return _inverse(mean) / len(mean)

    def _evaluate(self, loss: _Loss, batch: list[int], parameters: list[nn.Parameter]) -> Tensor:
        """The loss of a batch, (1,) on the device. Where gradients are enabled, ``parameters`` get their gradients. All
        processes call it together."""
        mine = [sample for sample in batch if sample in loss.sparse.samples]
        full = len(mine) // self._piece * self._piece
        pieces = [mine[i : i + self._piece] for i in range(0, full, self._piece)] + [[sample] for sample in mine[full:]]
        total = torch.zeros(1, device=loss.sparse.device)
        for parameter in parameters:
            parameter.grad = None
        together(partial(loss.add_up, pieces, total))
        # What no token of any process reaches, such as an expert, has a gradient of zero.
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found = torch.cat([total, *(gradient.flatten() for gradient in own)])
        mean = sum_over_processes(found) / (len(batch) * self._length)
        value, *gradients = mean.split([1, *(p.numel() for p in parameters)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        return value.clone()  # a view would keep all gradients


@dataclass(frozen=True)
class _Loss:
    """The loss of block ``index``, summed over tokens. ``weights`` (H,) fp64: of the channels' squares."""

    index: int
    sparse: BlockStream
    dense: BlockStream
    weights: Tensor

    def add_up(self, pieces: Sequence[list[int]], total: Tensor) -> None:
        """Add the loss of samples of this process to ``total`` (1,), and where gradients are enabled its gradient to
        the block's parameters. Each piece is one forward pass."""
        for samples in pieces:
            output = _wide(self.sparse.run_on(self.index, self.sparse.take(samples)))
            target = _wide(self.dense.take(samples))
            squares = (output - target).square() * _token_weights(target)
            part = (squares @ self.weights.to(squares.dtype)).sum()
            if part.requires_grad:
                part.backward()
            total += part.detach()


def _copy(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _token_weights(dense: Tensor) -> Tensor:
    """What the squares of a token's differences count, 1 / r_t^2: (batch, length, 1), of outputs (batch, length, H)."""
    return _inverse(dense.square().mean(-1, keepdim=True))


def _inverse(squares: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0 or too small for fp32."""
    return torch.where(squares > torch.finfo(torch.float32).tiny, 1 / squares, 0.0)


def _wide(values: Tensor) -> Tensor:
    """The same numbers in fp32, or in fp64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
