"""One decoder block of a wrapped model: how it runs dense or merged, and how its linears are pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa.distributed.collectives import from_process
from losa.distributed.processes import process_index
from losa.distributed.sharding import gathered, on_host, sharding_of, whole
from losa.distributed.together import together
from losa.errors import NumericsError
from losa.model.wrapping import count_kept
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode
from losa.pruners.base import Pattern, Pruned, Pruner
from losa_kernels import unpack_mask


class WrappedBlock:
    """A block, its masked-LoRA linears by name within it, and the weights that they were given.

    While the model is sharded, all work on a block is done within ``gathered``.

    Args:
        name: full name, for messages.
        module: the block.
        keeps_originals: whether weights that pruning replaces are needed later, as the dense model or to regrow from.
            They are references, not copies, until a weight is first replaced; then the original moves to host memory,
            of a sharded weight each process's rows. That frees the device's memory once nobody else holds it.
    """

    def __init__(self, name: str, module: nn.Module, keeps_originals: bool):
        self.name = name
        self.module = module
        self.linears: dict[str, MaskedLoRALinear] = {
            name: m for name, m in module.named_modules() if isinstance(m, MaskedLoRALinear)
        }
        self._originals: dict[str, Tensor] = {}
        if keeps_originals:
            # A sharded weight is another parameter once it was replaced; a plain one has other data.
            self._originals = {
                name: m.weight.data if sharding_of(m) is None else m.weight for name, m in self.linears.items()
            }
        # Sharded originals that are the present weights, and so are whole already.
        self._present: set[str] = set()

    def sparsity(self) -> float:
        """Share of pruned weights, counted from the masks."""
        total = sum(m.weight.numel() for m in self.linears.values())
        kept = sum(count_kept(m) for m in self.linears.values())
        return 1 - kept / total

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The block with whole parameters; it is sharded anew at the end. All processes enter and leave together. It
        does nothing to a model that is not sharded."""
        self._present = {name for name, original in self._originals.items() if original is self.linears[name].weight}
        try:
            with gathered(self.module):
                yield
        finally:
            self._present = set()

    def _whole_originals(self) -> dict[str, Tensor]:
        """Original weights by name, those alone that may differ from the present weights. All processes call it
        together."""
        return {name: whole(original) for name, original in self._originals.items() if name not in self._present}

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The block as it was before any pruning: original weights, no mask, no adapter."""
        originals = self._whole_originals()
        with self._plain({name: original.to(self.linears[name].weight.device) for name, original in originals.items()}):
            yield

    @contextmanager
    def merged(self) -> Iterator[None]:
        """The block with its weights M * (W + s B A) formed once for all batches, rounded as its layers round them."""
        with self._plain({name: m.effective_weight() for name, m in self.linears.items()}):
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
        self,
        pruner: Pruner,
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern,
        nested: bool,
        owners: Mapping[str, int],
    ) -> dict[str, float | None]:
        """Prune all linears. Each process decides about its own linears, and gives masks and weights to all.

        Args:
            statistics: of the linears that this process owns.
            nested: what is pruned already stays pruned.
            owners: the process that owns each linear.

        Returns:
            by full name, the damping of linears that have a Hessian; None where no damping was enough.

        Raises:
            NumericsError: names block and linear.
            ValueError: the pruner did not decide about every linear once, or a mask or weight does not fit its linear.
        """
        mine = [name for name in self.linears if owners[name] == process_index()]
        # Sharded originals become whole here, where all processes are.
        originals = {} if nested else self._whole_originals()
        weights = _WeightsToPrune(self, mine, originals, pruner.updates_weight, nested)
        decided = together(lambda: self._decide(pruner, weights, statistics, pattern, nested) if mine else {})
        damping: dict[str, float | None] = {}
        for name, layer in self.linears.items():
            owner = owners[name]
            outcome = decided[owner][name]
            weight = from_process(layer.weight.data, owner) if outcome.replaced else None
            mask = from_process(layer.mask.data, owner)
            if owner != process_index():
                self._put(name, mask, weight)
            if outcome.damping is not None:
                damping[f"{self.name}.{name}"] = outcome.damping if math.isfinite(outcome.damping) else None
        return damping

    def _decide(
        self,
        pruner: Pruner,
        weights: _WeightsToPrune,
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern,
        nested: bool,
    ) -> dict[str, _Outcome]:
        """What the pruner says of the linears whose ``weights`` it is given; it goes into their layers at once."""
        masks = {name: self.linears[name].mask.data if nested else None for name in weights}
        outcomes = {}
        names = []
        for name, pruned in self._outcomes(pruner, weights, statistics, pattern, masks):
            names.append(name)
            if name not in weights:
                break
            try:
                self._install(name, pruned)
            except ValueError as error:
                raise ValueError(f"{self.name}.{name}: {error}") from error
            outcomes[name] = _Outcome(pruned.weight is not None, pruned.damping)
            del pruned  # its weight would be held while the next one is pruned
        if sorted(names) != sorted(weights):
            kind = type(pruner).__name__
            raise ValueError(f"{kind}.prune_block: expected outcomes for {', '.join(weights)}; got {names}")
        return outcomes

    def _outcomes(self, pruner: Pruner, *args) -> Iterator[tuple[str, Pruned]]:
        """``prune_block``, whose errors get the block's name."""
        try:
            yield from pruner.prune_block(*args)
        except (NumericsError, ValueError) as error:
            linear = str(error).partition(":")[0]
            raise NumericsError(f"{self.name}{'.' if linear in self.linears else ': '}{error}") from error

    def dense_values(self, name: str, originals: Mapping[str, Tensor], updates_weight: bool, nested: bool) -> Tensor:
        """What a pruner is given of a linear: fp32 (out, in), a new tensor.

        Mask-only methods rank dense values. A method that updates weights must not compensate for a weight twice, so
        it sees earlier zeros as zeros, or starts from the original when weights may come back.

        Args:
            originals: whole original weights that may differ from the present ones.
        """
        layer = self.linears[name]
        if not updates_weight:
            return layer.dense_weight()
        if nested:
            return layer.dense_weight() * layer.mask_bool()
        adapter = layer.dense_weight() - layer.weight.float()
        return originals.get(name, layer.weight).to(adapter.device).float() + adapter

    def _install(self, name: str, pruned: Pruned) -> None:
        layer, base = self.linears[name], None
        if pruned.weight is not None:
            if not torch.isfinite(pruned.weight).all():
                raise NumericsError(f"{self.name}.{name}: pruning made a weight non-finite")
            adapter = layer.dense_weight() - layer.weight.float()
            kept = unpack_mask(pruned.mask, layer.in_features)
            base = torch.where(kept, pruned.weight - adapter, layer.weight.float())
        self._put(name, pruned.mask, base)

    def _put(self, name: str, mask: Tensor, weight: Tensor | None) -> None:
        layer = self.linears[name]
        if weight is not None:
            self._present.discard(name)
            layer.replace_weight(weight)
            self._move_original(name)
        layer.set_mask(mask)

    def move_originals(self) -> None:
        """Move the originals of weights that were replaced to host memory."""
        for name, layer in self.linears.items():
            if layer.weight_replaced:
                self._move_original(name)

    def _move_original(self, name: str) -> None:
        if name in self._originals:
            self._originals[name] = on_host(self._originals[name])


@dataclass(frozen=True)
class _Outcome:
    """``replaced``: whether kept weights were changed; ``damping``: as in ``Pruned``."""

    replaced: bool
    damping: float | None


class _WeightsToPrune(Mapping[str, Tensor]):
    """``dense_values`` by name, formed when they are asked for: a block's weights in fp32 take much memory."""

    def __init__(
        self,
        block: WrappedBlock,
        names: Iterable[str],
        originals: Mapping[str, Tensor],
        updates_weight: bool,
        nested: bool,
    ):
        self._block, self._names = block, list(names)
        self._how = originals, updates_weight, nested

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._block.dense_values(name, *self._how)

    def __contains__(self, name: object) -> bool:  # Mapping's own would form the weight
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
