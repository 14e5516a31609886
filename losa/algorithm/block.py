"""One decoder block of a wrapped model: how it runs dense or merged, and how its linears are pruned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from losa.distributed.collectives import from_rank_zero
from losa.errors import NumericsError
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode
from losa.pruners.base import Pattern, Pruned, Pruner
from losa_kernels import merge_masked_lora, unpack_mask


class WrappedBlock:
    """A block, its masked-LoRA linears by name within it, and the weights that they were given.

    Args:
        name: full name, for messages.
        module: the block.
        updates_weight: whether pruning replaces weights. The weights given then serve as the dense model of later
            rounds: references, not copies, until a weight is first replaced; then the original moves to host memory.
    """

    def __init__(self, name: str, module: nn.Module, updates_weight: bool):
        self.name = name
        self.module = module
        self.linears: dict[str, MaskedLoRALinear] = {
            name: m for name, m in module.named_modules() if isinstance(m, MaskedLoRALinear)
        }
        self._originals: dict[str, Tensor] = {}
        if updates_weight:
            self._originals = {name: m.weight.data for name, m in self.linears.items()}

    def sparsity(self) -> float:
        """Share of pruned weights, counted from the masks."""
        total = sum(m.weight.numel() for m in self.linears.values())
        kept = sum(int(m.mask_bool().sum()) for m in self.linears.values())
        return 1 - kept / total

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The block as it was before any pruning: original weights, no mask, no adapter."""
        originals = {}
        for name, original in self._originals.items():
            originals[name] = original.to(self.linears[name].weight.device)
        with self._plain(originals):
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The block with its weights M * (W + s B A) formed once for all batches, rounded as its layers round them."""
        merged = {
            name: merge_masked_lora(m.weight.data, m.mask, m.lora_A, m.lora_B, m.scaling)
            for name, m in self.linears.items()
        }
        with self._plain(merged):
            yield

    @contextmanager
    def _plain(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Plain products with other weights for the time being."""
        before = {name: self.linears[name].weight.data for name in weights}
        for name, weight in weights.items():
            self.linears[name].weight.data = weight
        try:
            with dense_mode(self.module):
                yield
        finally:
            for name, weight in before.items():
                self.linears[name].weight.data = weight

    def prune(
        self, pruner: Pruner, statistics: Mapping[str, Tensor | None], pattern: Pattern, nested: bool
    ) -> dict[str, float | None]:
        """Prune all linears. ``nested``: what is pruned already stays pruned.

        Returns:
            by full name, the damping of linears that have a Hessian; None where no damping was enough.

        Raises:
            NumericsError: names block and linear.
            ValueError: the pruner did not decide about every linear once, or a mask or weight does not fit its linear.
        """
        weights = _WeightsToPrune(self, pruner.updates_weight, nested)
        masks = {name: m.mask.data if nested else None for name, m in self.linears.items()}
        damping: dict[str, float | None] = {}
        decided = []
        for name, pruned in self._outcomes(pruner, weights, statistics, pattern, masks):
            decided.append(name)
            if name not in self.linears:
                break
            try:
                self._install(name, pruned)
            except ValueError as error:
                raise ValueError(f"{self.name}.{name}: {error}") from error
            if pruned.damping is not None:
                damping[f"{self.name}.{name}"] = pruned.damping if math.isfinite(pruned.damping) else None
            del pruned  # its weight would be held while the next one is pruned
        if sorted(decided) != sorted(self.linears):
            kind = type(pruner).__name__
            raise ValueError(f"{kind}.prune_block: expected outcomes for {', '.join(self.linears)}; got {decided}")
        return damping

    def _outcomes(self, pruner: Pruner, *args) -> Iterator[tuple[str, Pruned]]:
        """``prune_block``, whose errors get the block's name."""
        try:
            yield from pruner.prune_block(*args)
        except (NumericsError, ValueError) as error:
            linear = str(error).partition(":")[0]
            raise NumericsError(f"{self.name}{'.' if linear in self.linears else ': '}{error}") from error

    def dense_values(self, name: str, updates_weight: bool, nested: bool) -> Tensor:
        """What a pruner is given of a linear: fp32 (out, in), a new tensor.

        Mask-only methods rank dense values. A method that updates weights must not compensate for a weight twice, so
        it sees earlier zeros as zeros, or starts from the original when weights may come back.
        """
        layer = self.linears[name]
        if not updates_weight:
            return layer.dense_weight()
        if nested:
            return layer.dense_weight() * layer.mask_bool()
        adapter = layer.dense_weight() - layer.weight.float()
        return self._originals[name].to(adapter.device).float() + adapter

    def _install(self, name: str, pruned: Pruned) -> None:
        layer = self.linears[name]
        mask = from_rank_zero(pruned.mask)
        if pruned.weight is not None:
            swept = from_rank_zero(pruned.weight)
            if not torch.isfinite(swept).all():
                raise NumericsError(f"{self.name}.{name}: pruning made a weight non-finite")
            self._originals[name] = self._originals[name].to("cpu")
            adapter = layer.dense_weight() - layer.weight.float()
            kept = unpack_mask(mask, layer.in_features)
            base = torch.where(kept, swept - adapter, layer.weight.float())
            layer.replace_weight(base)
        layer.set_mask(mask)


class _WeightsToPrune(Mapping[str, Tensor]):
    """``dense_values`` by name, formed when they are asked for: a block's weights in fp32 take much memory."""

    def __init__(self, block: WrappedBlock, updates_weight: bool, nested: bool):
        self._block, self._how = block, (updates_weight, nested)

    def __getitem__(self, name: str) -> Tensor:
        return self._block.dense_values(name, *self._how)

    def __contains__(self, name: object) -> bool:  # Mapping's own would form the weight
        return name in self._block.linears

    def __iter__(self) -> Iterator[str]:
        return iter(self._block.linears)

    def __len__(self) -> int:
        return len(self._block.linears)
