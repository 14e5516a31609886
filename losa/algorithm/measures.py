"""What importances are computed from, measured on calibration samples: one streaming pass over the blocks, or one pass
forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from losa.algorithm.block import WrappedBlock
from losa.algorithm.expected_loss import Energies, loss_curve
from losa.algorithm.statistics import InputNorms, collect
from losa.algorithm.stream import BlockStream
from losa.distributed.collectives import from_rank_zero, sum_over_processes
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.watch import progress
from losa.errors import NumericsError
from losa.modules.masked_lora import MaskedLoRALinear
from losa.recipe.rates import Needs
from losa_kernels import cka_similarity


@dataclass(frozen=True)
class Measured:
    """The blocks of a wrapped model, as they are now, and a stream of the samples that serve rates.

    ``prefix``: what the blocks' names begin with. ``open_stream``: makes a new stream. ``energies``: takes the energies
    of all linears, by full name. Several processes call all of this together, in evaluation mode and without gradients.
    """

    blocks: Sequence[WrappedBlock]
    prefix: str
    open_stream: Callable[[], BlockStream]
    energies: Callable[[], Mapping[str, Energies]]

    def passed(self, run: Callable[[int, BlockStream], object]) -> Iterator[BlockStream]:
        """Let a new stream pass block after block, by ``run``; yields it behind every block, which is whole until the
        next block's turn."""
        stream = self.open_stream()
        for index, block in enumerate(self.blocks):
            progress(f"comparing {block.name}")
            check()
            with block.gathered():
                run(index, stream)
                yield stream

    def advance(self, index: int, stream: BlockStream) -> None:
        together(partial(self.advance_alone, index, stream))

    def advance_alone(
        self, index: int, stream: BlockStream, see: Callable[[Tensor, Tensor], None] | None = None
    ) -> None:
        with self.blocks[index].merged():
            stream.advance(index, see)


def linears(measured: Measured) -> list[dict[str, MaskedLoRALinear]]:
    """The wrapped linears of every block, by name."""
    return [block.linears for block in measured.blocks]


def position(measured: Measured) -> Tensor:
    """0, 1, ..., L - 1: (L,) fp64."""
    return torch.arange(len(measured.blocks), dtype=torch.float64)


def losses(measured: Measured, nested: bool = False, by_rows: bool = False) -> list[dict[str, Tensor]]:
    """The curves of expected loss of every block's linears, by name: of weights as they are now.

    Args:
        nested, by_rows: of ``loss_curve``.

    Raises:
        Stopped: between two samples, if a signal asks for it.
        NumericsError: inputs, gradients or squared weights that are not finite; names the linear.
    """
    energies = measured.energies()
    found: list[dict[str, Tensor]] = []
    for block in measured.blocks:
        check()
        found.append({})
        for name, linear in block.linears.items():
            own, where = energies[f"{block.name}.{name}"], f"calibration: {block.name}.{name}"
            if not (own.inputs.isfinite().all() and own.outputs.isfinite().all()):
                raise NumericsError(f"{where}: expected finite inputs and gradients, got nan or inf")
            curve = together(partial(loss_curve, linear, own, nested, by_rows))[0]
            if not curve[-1].isfinite():
                raise NumericsError(f"{where}: expected squares of weights that are finite in fp32, got inf")
            found[-1][name] = curve
    return found


def similarity(measured: Measured, gram_of: Callable[[BlockStream], Tensor] = lambda stream: stream.gram()) -> Tensor:
    """CKA between block outputs: (L, L) fp64.

    Args:
        gram_of: the centred Gram of a block's output, by default of samples (Eq. 6).

    Raises:
        Stopped: between two blocks, if a signal asks for it.
        NumericsError: outputs that are not finite or cannot be compared; names the block.
    """
    grams = []
    for block, stream in zip(measured.blocks, measured.passed(measured.advance), strict=True):
        try:
            grams.append(gram_of(stream))
        except ValueError as error:
            raise NumericsError(f"calibration: output of {block.name}: {error}") from error
    try:
        return from_rank_zero(cka_similarity(torch.stack(grams)).double())
    except ValueError as error:
        raise NumericsError(f"calibration: blocks of {measured.prefix} cannot be compared: {error}") from error


def normalised_similarity(measured: Measured) -> Tensor:
    """``similarity`` between tokens of one size, (L, L) fp64. Between whole samples the few tokens with massive
    activations decide; and where samples are few against their features, any two blocks seem alike."""
    return similarity(measured, lambda stream: stream.gram_of_tokens())


def input_norms(measured: Measured) -> Iterator[dict[str, Tensor]]:
    """||X_j|| of every linear's inputs, (in,) fp32 by name, block after block; each process gets all of them."""
    norms: dict[str, Tensor] = {}

    def run(index: int, stream: BlockStream) -> None:
        nonlocal norms
        block = measured.blocks[index]
        found = collect(
            block.linears,
            InputNorms,
            block.name,
            lambda: stream.position,
            lambda: measured.advance_alone(index, stream),
            lambda groups: {name: 0 for group in groups for name in group},
        ).statistics
        norms = {
            name: from_rank_zero(found.get(name, InputNorms.flat(linear.in_features, linear.weight.device)))
            for name, linear in block.linears.items()
        }

    for _ in measured.passed(run):
        yield norms


def scores(measured: Measured) -> Iterator[list[Tensor]]:
    """Wanda's scores |W + s B A| ||X||, block after block: of every linear (out, in) fp32, pruned entries too."""
    for block, norms in zip(measured.blocks, input_norms(measured), strict=True):
        yield [linear.dense_weight().abs_().mul_(norms[name]) for name, linear in block.linears.items()]


def cosines(measured: Measured) -> Tensor:
    """Mean over tokens of the cosine between a token's hidden state before and after each block: (L,) fp64.

    Raises:
        NumericsError: hidden states that are not finite; names the block.
    """
    found: list[Tensor] = []

    def run(index: int, stream: BlockStream) -> None:
        # The sum of cosines, and how many there are.
        sums = torch.zeros(2, dtype=torch.float64, device=stream.device)

        def see(before: Tensor, after: Tensor) -> None:
            cosine = torch.cosine_similarity(before.to(after.device).float(), after.float(), dim=-1)
            sums.add_(torch.stack([cosine.double().sum(), sums.new_tensor(cosine.numel())]))

        together(partial(measured.advance_alone, index, stream, see))
        total, count = sum_over_processes(sums).cpu()
        found.append(from_rank_zero(total / count))

    for block, _ in zip(measured.blocks, measured.passed(run), strict=True):
        if not torch.isfinite(found[-1]):
            raise NumericsError(f"calibration: output of {block.name}: expected finite values, got nan or inf")
    return torch.stack(found)


MEASURES: dict[Needs, Callable[[Measured], Any]] = {
    "linears": linears,
    "position": position,
    "losses": losses,
    "similarity": similarity,
    "normalised similarity": normalised_similarity,
    "scores": scores,
    "cosines": cosines,
}
