"""The LoSA rounds: rates -> masks -> reconstruction errors -> ranks. Someone else trains in between.

Pure PyTorch on wrapped models; nothing here knows about data sets, optimisers or files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losa.algorithm.importance import cka_importance
from losa.algorithm.keep_counts import allocate_keep_n
from losa.algorithm.ranks import allocate_ranks, ranks_by_sparsity, uniform_ranks
from losa.algorithm.rates import cka_rates
from losa.algorithm.reconstruction import ErrorMeter
from losa.algorithm.schedule import RoundPlan
from losa.algorithm.statistics import collect
from losa.algorithm.stream import BlockStream
from losa.errors import ModelError, NumericsError, RecipeError
from losa.model.block_calls import Call
from losa.model.blocks import find_blocks
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode
from losa.pruners import get_pruner
from losa.pruners.base import Pattern, Pruned
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig
from losa.record import RoundRecord
from losa_kernels import cka_similarity, merge_masked_lora, unpack_mask
from losa_kernels.pruning import free_graphs


class Engine:
    """Prunes a wrapped model round by round and gives every block its sparsity rate and rank.

    Args:
        model: causal LM whose block linears are ``MaskedLoRALinear`` (``losa.model.wrap_model``).
        input_ids: calibration tokens (samples, length) int64.
        prune, allocation, calibration: the recipe's sections.
        measure_errors: take reconstruction errors (one dense forward pass more) even if ranks do not need them.
        seed: for the Gaussian rows of growing adapters.
        calls: ``BlockStream``'s, of another stream of this model: what it found out is not found out again.

    The engine never writes into a weight it was given: a pruner that updates weights gets new tensors, and the
    originals serve as the dense model of later rounds (kept in host memory).
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
        calls: dict[tuple[int, int], list[Call]] | None = None,
    ):
        self.model = model
        self.input_ids = input_ids
        self.prune_config = prune
        self.allocation = allocation
        self.calibration = calibration
        self.seed = seed
        found = find_blocks(model)
        self.name, self.blocks = found.prefix, found.modules
        self.pruner = get_pruner(prune)
        self.needs_errors = measure_errors or allocation.ranks == "error"
        self.layers: list[dict[str, MaskedLoRALinear]] = [
            {name: m for name, m in block.named_modules() if isinstance(m, MaskedLoRALinear)} for block in self.blocks
        ]
        empty = [i for i, layers in enumerate(self.layers) if not layers]
        if empty:
            raise ModelError(f"blocks {empty} have no wrapped linear; wrap the model first")
        if prune.pattern is not None:
            m = prune.keep_n_m[1]
            odd = [
                f"{i}.{name}" for i, block in enumerate(self.layers) for name in block if block[name].in_features % m
            ]
            if odd:
                raise RecipeError(f"prune.pattern: {odd[0]} has in_features that are no multiple of {m}")
        self._calls = {} if calls is None else calls
        # References, not copies, until a weight is first replaced; then the original moves to host memory.
        self._originals: dict[MaskedLoRALinear, Tensor] = {}
        if self.pruner.updates_weight:
            self._originals = {m: m.weight.data for layers in self.layers for m in layers.values()}

    def block_sparsity(self) -> list[float]:
        """Share of pruned weights per block, counted from the masks."""
        rates = []
        for layers in self.layers:
            total = sum(m.weight.numel() for m in layers.values())
            kept = sum(int(m.mask_bool().sum()) for m in layers.values())
            rates.append(1 - kept / total)
        return rates

    def similarity(self) -> Tensor:
        """CKA between block outputs of the model as it is now (Eq. 6): (L, L) fp64."""
        ids = self.input_ids[: self.calibration.cka_samples]
        with torch.no_grad():
            stream = self._stream(ids)
            grams = []
            for index in range(len(self.blocks)):
                with self._merged_block(index):
                    stream.advance(index)
                try:
                    grams.append(stream.gram())
                except ValueError as error:
                    raise NumericsError(f"calibration: output of {self.name}.{index}: {error}") from error
        try:
            return _from_rank_zero(cka_similarity(torch.stack(grams)).double())
        except ValueError as error:
            raise NumericsError(f"calibration: blocks of {self.name} cannot be compared: {error}") from error

    def run_round(self, plan: RoundPlan) -> RoundRecord:
        """Rates, masks, errors and ranks of one round; the adapters are then ready to be trained.

        Raises:
            NumericsError: non-finite statistics, or a singular Hessian; names block and linear.
        """
        seconds: dict[str, float] = {}
        record = RoundRecord(
            index=plan.index,
            target_sparsity=plan.sparsity,
            mean_rank=float(plan.mean_rank),
            sparsity=[],
            ranks=[],
            seconds=seconds,
        )
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            with _timed(seconds, "rates"):
                patterns = self._patterns(plan, record)
            errors = self._prune_blocks(patterns, record, seconds)
            with _timed(seconds, "ranks"):
                record.sparsity = self.block_sparsity()
                record.errors = errors
                record.ranks = self._ranks(plan, errors, record.sparsity).tolist()
                self._set_ranks(plan, record.ranks)
        self.model.train(was_training)
        return record

    def _stream(self, input_ids: Tensor) -> BlockStream:
        batch_size = self.calibration.batch_size
        return BlockStream(self.model, self.blocks, input_ids, batch_size, calls=self._calls, name=self.name)

    def _patterns(self, plan: RoundPlan, record: RoundRecord) -> list[Pattern]:
        """What each block keeps in this round."""
        count = len(self.blocks)
        importance = None
        if self.allocation.rates == "cka" and count > 1:
            similarity = self.similarity()
            importance = cka_importance(similarity)
            record.similarity = similarity.tolist()
            record.importance = importance.tolist()
        nested = not self.prune_config.regrow
        if self.prune_config.pattern is not None:
            return self._nm_patterns(plan, record, importance)
        if importance is None:
            rates = [plan.sparsity] * count
        else:
            floor = torch.tensor(self.block_sparsity(), dtype=torch.float64) if nested else None
            rates = cka_rates(similarity, plan.sparsity, self.allocation.delta, floor).tolist()
        return [Pattern(sparsity=rate) for rate in rates]

    def _nm_patterns(self, plan: RoundPlan, record: RoundRecord, importance: Tensor | None) -> list[Pattern]:
        keep_n, m = self.prune_config.keep_n_m
        count = len(self.blocks)
        final = abs(plan.sparsity - self.prune_config.final_sparsity) < 1e-9
        if final and not self.prune_config.mixed:
            counts = [keep_n] * count
        else:
            ceiling = None
            if not self.prune_config.regrow:
                kept = 1 - torch.tensor(self.block_sparsity(), dtype=torch.float64)
                ceiling = (kept * m).round().long()
            mean_keep = m * (1 - plan.sparsity)
            delta = self.allocation.delta
            if importance is None:
                importance, delta = torch.zeros(count, dtype=torch.float64), 0.0
            lowest = 1 if self.prune_config.mixed else keep_n
            counts = allocate_keep_n(importance, mean_keep, m, delta, lo=lowest, ceiling=ceiling).tolist()
        record.keep_n, record.m = counts, m
        return [Pattern(keep_n=n, m=m) for n in counts]

    def _prune_blocks(
        self, patterns: list[Pattern], record: RoundRecord, seconds: dict[str, float]
    ) -> list[float] | None:
        """One streaming pass: dense and sparse streams in lockstep; prunes each block on the sparse stream's input."""
        with _timed(seconds, "forward"):
            sparse = self._stream(self.input_ids)
            dense = self._stream(self.input_ids) if self.needs_errors else None
        errors = []
        for index, pattern in enumerate(patterns):
            where = f"{self.name}.{index}"
            if dense is not None:
                with _timed(seconds, "forward"), self._dense_block(index):
                    dense.advance(index)
            with (
                _timed(seconds, "forward"),
                self._merged_block(index),
                collect(self.layers[index], self.pruner.statistic, where, lambda: sparse.position) as statistics,
            ):
                if self.pruner.statistic != "none":
                    for _ in sparse.run(index):
                        pass
            with _timed(seconds, "prune"):
                if (prepare := getattr(self.pruner, "prepare", None)) is not None:
                    prepare(statistics.values())
                for name, layer in self.layers[index].items():
                    self._prune_linear(f"{where}.{name}", layer, statistics[name], pattern, record)
            with _timed(seconds, "forward"):
                with self._merged_block(index):
                    sparse.advance(index)
                if dense is not None:
                    meter = ErrorMeter(sparse.hidden[0].shape[-1], self.allocation.error, sparse.device)
                    for d, s in zip(dense.hidden, sparse.hidden, strict=True):
                        meter.update(d, s)
                    errors.append(meter.result())
        free_graphs()  # training needs the memory
        if not errors:
            return None
        return _from_rank_zero(torch.tensor(errors, dtype=torch.float64)).tolist()

    def _prune_linear(
        self, where: str, layer: MaskedLoRALinear, statistic: Tensor | None, pattern: Pattern, record: RoundRecord
    ) -> None:
        if statistic is None and self.pruner.statistic != "none":
            # An expert that saw no token: flat norms (or an identity Hessian) make the choice by magnitude.
            device = layer.weight.device
            flat = torch.ones(layer.in_features, device=device)
            statistic = torch.diag(flat) if self.pruner.statistic == "hessian" else flat
        nested = not self.prune_config.regrow
        values = self._values_to_prune(layer, nested)
        try:
            pruned = self.pruner.prune(values, statistic, pattern, layer.mask.data if nested else None)
        except (NumericsError, ValueError) as error:
            raise NumericsError(f"{where}: {error}") from error
        if pruned.damping is not None:
            record.damping[where] = pruned.damping if math.isfinite(pruned.damping) else None
        self._install(where, layer, pruned)

    def _values_to_prune(self, layer: MaskedLoRALinear, nested: bool) -> Tensor:
        """fp32 (out, in). Mask-only methods rank dense values; a method that updates weights must not compensate
        for a weight twice, so it sees earlier zeros as zeros, or starts from the original when regrowing."""
        if not self.pruner.updates_weight:
            return layer.dense_weight()
        if nested:
            return layer.dense_weight() * layer.mask_bool()
        adapter = layer.dense_weight() - layer.weight.float()
        return self._originals[layer].to(adapter.device).float() + adapter

    def _install(self, where: str, layer: MaskedLoRALinear, pruned: Pruned) -> None:
        mask = _from_rank_zero(pruned.mask)
        if pruned.weight is not None:
            swept = _from_rank_zero(pruned.weight)
            if not torch.isfinite(swept).all():
                raise NumericsError(f"{where}: pruning made a weight non-finite")
            self._originals[layer] = self._originals[layer].to("cpu")
            adapter = layer.dense_weight() - layer.weight.float()
            kept = unpack_mask(mask, layer.in_features)
            base = torch.where(kept, swept - adapter, layer.weight.float())
            layer.replace_weight(base)
        layer.set_mask(mask)

    @contextmanager
    def _dense_block(self, index: int) -> Iterator[None]:
        """The block as it was before any pruning: original weights, no mask, no adapter."""
        swapped = {m: m.weight.data for m in self.layers[index].values() if m in self._originals}
        for layer, current in swapped.items():
            layer.weight.data = self._originals[layer].to(current.device)
        try:
            with dense_mode(self.blocks[index]):
                yield
        finally:
            for layer, current in swapped.items():
                layer.weight.data = current

    @contextmanager
    def _merged_block(self, index: int) -> Iterator[None]:
        """The block with its weights M * (W + s B A) formed once for all batches, rounded as its layers round them."""
        swapped = {m: m.weight.data for m in self.layers[index].values()}
        for layer, weight in swapped.items():
            layer.weight.data = merge_masked_lora(weight, layer.mask, layer.lora_A, layer.lora_B, layer.scaling)
        try:
            with dense_mode(self.blocks[index]):
                yield
        finally:
            for layer, weight in swapped.items():
                layer.weight.data = weight

    def _ranks(self, plan: RoundPlan, errors: list[float] | None, sparsity: list[float]) -> Tensor:
        config, count = self.allocation, len(self.blocks)
        bounds = (plan.mean_rank, config.rank_min, config.rank_max)
        if config.ranks == "error":
            return allocate_ranks(torch.tensor(errors, dtype=torch.float64), *bounds)
        if config.ranks == "sparsity":
            return ranks_by_sparsity(torch.tensor(sparsity, dtype=torch.float64), *bounds)
        return uniform_ranks(count, plan.mean_rank)

    def _set_ranks(self, plan: RoundPlan, ranks: list[int]) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + plan.index)
        for rank, layers in zip(ranks, self.layers, strict=True):
            for layer in layers.values():
                layer.set_rank(rank, generator=generator)


def _from_rank_zero(tensor: Tensor) -> Tensor:
    """Every process decides alike: rank 0's value replaces the others' (a no-op without torch.distributed)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    device = tensor.device
    shared = tensor.cuda() if dist.get_backend() == "nccl" else tensor.contiguous()
    dist.broadcast(shared, 0)
    return shared.to(device)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
