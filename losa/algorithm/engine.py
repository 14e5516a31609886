"""The LoSA rounds: rates -> masks -> reconstruction of blocks -> errors -> ranks. Someone else trains in between.

Pure PyTorch on wrapped models; nothing here knows about data sets, optimisers or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from losa.algorithm.block import WrappedBlock
from losa.algorithm.block_pruning import BlockPruning, check_experts, warn_of_few_tokens
from losa.algorithm.block_rates import BlockRates, Decided
from losa.algorithm.block_reconstruction import BlockReconstruction, Fit
from losa.algorithm.expected_loss import Energies, as_tensors, energies_of, from_tensors
from losa.algorithm.finished_blocks import FinishedBlocks
from losa.algorithm.gradient_statistics import GradientStatistic
from losa.algorithm.gradients import REGROWTH, Gradients, needs_whole
from losa.algorithm.linear_rates import LinearRates, check_linear, ranks_within
from losa.algorithm.patterns import check_groups
from losa.algorithm.ranks import ranks_of_blocks
from losa.algorithm.reconstruction import ErrorMeter
from losa.algorithm.regrowth import check_regrowth
from losa.algorithm.schedule import Round
from losa.algorithm.statistics import check_total
from losa.algorithm.stopwatch import Stopwatch
from losa.algorithm.stream import BlockStream
from losa.algorithm.structure import check_rates, find_structure
from losa.distributed.collectives import from_rank_zero
from losa.distributed.processes import process_count
from losa.distributed.sharding import gathered, is_whole, sharding_of
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.watch import progress
from losa.errors import ModelError, RecipeError
from losa.model.block_calls import Call
from losa.model.blocks import find_blocks
from losa.model.originals import Originals, dense_passes
from losa.model.running import evaluating
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode, plain_linears
from losa.pruners import get_pruner
from losa.pruners.base import Pruner
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa.recipe.training import ReconstructConfig, TrainConfig
from losa.record import RoundRecord
from losa_kernels.pruning import free_graphs


class Engine:
    """Prunes a wrapped model round by round and gives every block its sparsity rate and rank.

    Args:
        model: causal LM whose block linears are ``MaskedLoRALinear`` (``losa.model.wrap_model``).
        input_ids: calibration tokens (samples, length) int64.
        prune: the recipe's section, as are ``allocation`` and ``calibration``.
        allocation: rates and ranks.
        calibration: how many samples are read at a time, and how many serve CKA.
        measure_errors: take reconstruction errors (one dense forward pass more) even if ranks do not need them.
        seed: for the Gaussian rows of growing adapters, the order of samples in reconstruction, and drawn labels.
        distills: training reads the dense model: originals are kept, and stay on the device.
        loss: of the model as it is, on ids (samples, length) int64 on the host, the mean over tokens; all processes
            call it together. Needed where it chooses how far rates are from their mean (``allocation.rates: atp``).
        calls: ``BlockStream``'s, of another stream of this model: what it found out is not found out again.
        reconstruct: the recipe's section; None: pruned blocks are not reconstructed. With it errors are taken.
        train: the recipe's section: its factors on the learning rate hold in reconstruction too.
        finished: takes the blocks of an offloaded model, each when it is pruned. There is one round then.

    The engine never writes into a weight it was given: a pruner that updates weights gets new tensors. The originals
    serve as the dense model of later rounds, and are kept in host memory where reconstruction errors or
    ``prune.regrow`` (``regrow_by: score``) need them, on the device where training does.

    ``measured_once`` holds what all rounds need of the dense model: fp64 on the host, by name, alike in all processes.
    An engine that goes on in a later round finds there what an earlier one has measured.

    Several processes call it together, with the same arguments. They share out the samples, and the linears of a block
    (``owners_of``); the model may be whole in each of them, or sharded, but for statistics of gradients.

    Raises:
        ModelError: no blocks, a block without a wrapped linear, or a model that a structured pruner cannot shrink.
        ValueError: ``finished`` beside errors, which need the dense blocks too.
        RecipeError: an unknown pruner; a pattern that does not divide a linear's inputs; a statistic that is unknown,
            has no ``total`` on several processes; gradients of a sharded model; rates that the pruner cannot follow;
            regrowth that it does not know; or rates whose width needs a ``loss``.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        prune: PruneConfig,
        allocation: AllocationConfig,
        calibration: CalibrationConfig,
        *,
        measure_errors: bool = True,
        seed: int = 0,
        distills: bool = False,
        calls: dict[tuple[int, int], list[Call]] | None = None,
        loss: Callable[[Tensor], float] | None = None,
        reconstruct: ReconstructConfig | None = None,
        train: TrainConfig | None = None,
        finished: FinishedBlocks | None = None,
    ):
        self.model = model
        self.input_ids = input_ids
        self.prune_config = prune
        self.allocation = allocation
        self.calibration = calibration
        self.seed = seed
        self.finished = finished
        self.pruner = get_pruner(prune)
        if self.pruner.structured:
            check_rates(prune, allocation)
            self.pruner.structure = find_structure(model)
        self.pruning = BlockPruning(prune, allocation, self.pruner, calibration)
        if self.pruning.statistic is not None and process_count() > 1:
            check_total(prune, self.pruner, self.pruning.statistic)
        check_regrowth(prune, self.pruner)
        if (setting := needs_whole(prune, allocation, self.pruner)) and not is_whole(model):
            how = "sharded" if sharding_of(model) is not None else "offloaded"
            raise RecipeError(f"{setting} takes gradients, and needs the model whole, not {how}")
        self.reconstruction: BlockReconstruction | None = None
        if reconstruct is not None:
            self.reconstruction = BlockReconstruction(reconstruct, input_ids.shape, calibration.batch_size, train)
        self.needs_errors = measure_errors or allocation.ranks == "error" or reconstruct is not None
        if finished is not None and self.needs_errors:
            raise ValueError("finished: expected an engine that takes no reconstruction errors")
        if allocation.per != "block":
            check_linear(prune, allocation, self.pruner)
        self.decoder = find_blocks(model)
        # Offloaded blocks have one round: nothing comes back.
        kept = finished is None and (distills or keeps_originals(prune, self.pruner, self.needs_errors))
        named = zip(self.decoder.names, self.decoder, strict=True)
        self.blocks = [WrappedBlock(name, module, kept, distills) for name, module in named]
        self._calls = {} if calls is None else calls
        self.measured_once: dict[str, Tensor] = {}
        ids = input_ids[: calibration.cka_samples]
        self.rates = BlockRates(
            self.blocks,
            self.decoder.prefix,
            partial(self._stream, ids),
            partial(self._energies, ids),
            prune,
            allocation,
            None if loss is None else partial(loss, ids),
        )
        self._check_blocks()
        check_experts(self.blocks, calibration)
        if finished is not None:
            for block in self.blocks:
                block.note_kept({name: m.weight.numel() for name, m in block.linears.items()})

    def _check_blocks(self) -> None:
        empty = [i for i, block in enumerate(self.blocks) if not block.linears]
        if empty:
            raise ModelError(f"blocks {empty} have no wrapped linear: wrap the model first, with targets in each block")
        for index, block in enumerate(self.blocks):
            check_groups(self.prune_config, {f"{index}.{name}": m.in_features for name, m in block.linears.items()})

    def move_originals(self) -> None:
        """Move originals of weights that a resumed run's state has replaced to where they are kept."""
        for block in self.blocks:
            block.originals.move()

    @property
    def originals(self) -> dict[str, Originals]:
        """What the dense model is made of where it differs from the present one, by the block's full name."""
        return {block.name: block.originals for block in self.blocks}

    def block_sparsity(self) -> list[float]:
        """Share of pruned weights per block, counted from the masks."""
        return [block.sparsity() for block in self.blocks]

    def run_round(self, this_round: Round) -> RoundRecord:
        """Rates, masks, errors and ranks of one round; the adapters are then ready to be trained.

        Raises:
            Stopped: between two blocks that are compared or pruned, if a signal asks for it.
            NumericsError: non-finite statistics, or a singular Hessian; names block and linear.
        """
        watch = Stopwatch()
        with evaluating(self.model), torch.no_grad():
            with watch.stage("rates"):
                decide = partial(self.rates.decide, this_round)
                rates = decide() if self.finished is None else self.finished.rates(decide)
            gradients = None
            if wanted := self._wanted_gradients():
                with watch.stage("gradients"):
                    gradients = Gradients(self.model, self._linears(), self.input_ids, wanted)
            try:
                pruned = self._prune_blocks(rates, this_round, gradients)
            finally:
                free_graphs()  # training needs the memory, and so does whoever catches an error
            watch.seconds |= pruned.seconds
            if this_round.index == 1:
                warn_of_few_tokens(pruned.expert_tokens, self._linears())
            with watch.stage("ranks"):
                sparsity = self.block_sparsity()
                sizes = [sum(sizes_of_rank(block)) for block in self.blocks]
                ranks = ranks_of_blocks(self.allocation, this_round.mean_rank, pruned.errors, sparsity, sizes)
                self._set_ranks(this_round, ranks, pruned.linears)
        return RoundRecord(
            index=this_round.index,
            target_sparsity=this_round.sparsity,
            mean_rank=float(this_round.mean_rank),
            sparsity=sparsity,
            ranks=ranks,
            errors=pruned.errors,
            keep_n=[pattern.keep_n for pattern in rates.patterns if pattern.keep_n is not None] or None,
            m=rates.patterns[0].m,
            importance=None if rates.importance is None else rates.importance.tolist(),
            delta=rates.delta,
            **self._of_linears(),
            similarity=None if rates.similarity is None else rates.similarity.tolist(),
            damping=pruned.damping,
            expert_tokens=pruned.expert_tokens or None,
            seconds=watch.seconds,
            loss_pruned=None if pruned.fits is None else [fit.before for fit in pruned.fits],
            loss_reconstructed=None if pruned.fits is None else [fit.after for fit in pruned.fits],
        )

    def _of_linears(self) -> dict[str, Any]:
        """Fields of the record where the linears of a block differ."""
        if self.allocation.per == "block":
            return {}
        linears = self._linears()
        kept = {f"{block.name}.{name}": count for block in self.blocks for name, count in block.kept().items()}
        return {
            "linear_sparsity": {name: 1 - kept[name] / linear.weight.numel() for name, linear in linears.items()},
            "linear_ranks": {name: linear.rank for name, linear in linears.items()},
        }

    def _stream(self, input_ids: Tensor, **options: Any) -> BlockStream:
        batch_size = self.calibration.batch_size
        return BlockStream(self.model, self.decoder, input_ids, batch_size, calls=self._calls, **options)

    def _energies(self, input_ids: Tensor) -> dict[str, Energies]:
        """Of the dense model, in every round: what is pruned already hides how much its neighbours matter."""
        linears = self._linears()
        if not self.measured_once:
            with dense_passes(self.model, self.originals):
                self.measured_once |= as_tensors(energies_of(self.model, linears, input_ids, self.seed))
        return from_tensors(self.measured_once, linears)

    def _linears(self) -> dict[str, MaskedLoRALinear]:
        """All wrapped linears, by full name."""
        return {f"{block.name}.{name}": linear for block in self.blocks for name, linear in block.linears.items()}

    def _wanted_gradients(self) -> dict[str, type[GradientStatistic]]:
        """Statistics of gradients that this round takes. Before anything is pruned, nothing can come back."""
        wanted = self.pruning.gradients
        none_pruned = REGROWTH in wanted and not any(self.block_sparsity())
        return {key: each for key, each in wanted.items() if not (key == REGROWTH and none_pruned)}

    def _prune_blocks(self, rates: Decided, this_round: Round, gradients: Gradients | None) -> _PrunedBlocks:
        """One streaming pass: dense and sparse streams in lockstep; prunes each block on the sparse stream's input, and
        reconstructs it where that is asked for."""
        watch, reconstruction = Stopwatch(), self.reconstruction
        with watch.stage("forward"):
            sparse = self._stream(self.input_ids, other_sizes=() if reconstruction is None else reconstruction.sizes)
            # Norms outside of the blocks are dense too.
            within = partial(dense_mode, self.model)
            dense = self._stream(self.input_ids, within=within) if self.needs_errors else None
        errors: list[float] = []
        linears: list[LinearRates] = []
        damping: dict[str, float | None] = {}
        tokens: dict[str, list[int]] = {}
        fits: list[Fit] = []
        for index, block in enumerate(self.blocks):
            progress(f"calibrating {block.name}")
            check()
            with ExitStack() as whole_block:
                with watch.stage("forward"):
                    whole_block.enter_context(block.gathered())
                    if self.finished is not None and (found := self.finished.find(index)) is not None:
                        block.note_kept(found.kept)
                        damping |= found.damping
                        tokens |= found.expert_tokens
                        with plain_linears(block.module):
                            sparse.advance(index)
                        continue
                    if dense is not None:
                        with block.dense():
                            together(partial(dense.advance, index))
                pruned = self.pruning.prune(index, block, sparse, rates, gradients, this_round.later, watch)
                damping |= pruned.damping
                tokens |= pruned.expert_tokens
                if pruned.linears is not None:
                    linears.append(pruned.linears)
                if reconstruction is not None and dense is not None:
                    with watch.stage("reconstruct"):
                        seed = (self.seed * 1000 + this_round.index) * 1000 + index
                        fits.append(reconstruction.fit(block.name, index, sparse, dense, seed))
                with watch.stage("forward"):
                    together(partial(self._advance_merged, sparse, index))
                    if dense is not None:
                        errors.append(self._error(dense, sparse))
                if self.finished is not None:
                    with watch.stage("write"):
                        block.note_kept(self.finished.take(index, block, pruned).kept)
        if dense is None:
            return _PrunedBlocks(None, damping, linears, None, tokens, watch.seconds)
        decided = from_rank_zero(torch.tensor(errors, dtype=torch.float64)).tolist()
        return _PrunedBlocks(decided, damping, linears, fits or None, tokens, watch.seconds)

    def _advance_merged(self, stream: BlockStream, index: int) -> None:
        with self.blocks[index].merged():
            stream.advance(index)

    def _error(self, dense: BlockStream, sparse: BlockStream) -> float:
        meter = ErrorMeter(self.allocation.error, sparse.device)
        meter.update_all(dense.hidden, sparse.hidden)
        return meter.result()

    def _set_ranks(self, this_round: Round, ranks: list[int], linears: Sequence[LinearRates] = ()) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + this_round.index)
        for index, (rank, block) in enumerate(zip(ranks, self.blocks, strict=True)):
            own = [rank] * len(block.linears)
            if linears:
                own = ranks_within(linears[index], rank, self.allocation, sizes_of_rank(block))
            # A layer of rank 0 trains something else than low-rank factors.
            if all(m.rank in (wanted, 0) for m, wanted in zip(block.linears.values(), own, strict=True)):
                continue
            # Adapters alone: the weights are a thousand times as large.
            parts = {part for linear in block.linears.values() for part in linear.adapter_parts}
            with gathered(block.module, only=parts):
                for linear, wanted in zip(block.linears.values(), own, strict=True):
                    linear.set_rank(wanted, generator=generator)


def sizes_of_rank(block: WrappedBlock) -> list[int]:
    """The parameters of a rank of each linear of a block."""
    return [linear.in_features + linear.out_features for linear in block.linears.values()]


def keeps_originals(prune: PruneConfig, pruner: Pruner, needs_errors: bool) -> bool:
    """Whether weights that a pruner replaces are needed later: as the dense model, or to regrow from."""
    return pruner.updates_weight and (needs_errors or not prune.decisions_nested)


@dataclass(frozen=True)
class _PrunedBlocks:
    """What one pass over the blocks found: reconstruction errors by block, damping by linear, rates of linears by block
    (none where a block has one rate), losses of reconstruction by block, tokens of experts, seconds by stage."""

    errors: list[float] | None
    damping: dict[str, float | None]
    linears: list[LinearRates]
    fits: list[Fit] | None
    expert_tokens: dict[str, list[int]]
    seconds: dict[str, float]
