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
from losa.distributed.sharding import gathered
from losa.distributed.together import together
from losa.errors import NumericsError
from losa.model.originals import Originals, weights_in_place
from losa.model.wrapping import count_kept
from losa.modules.masked_lora import MaskedLoRALinear, dense_mode, plain_linears
from losa.pruners.base import Pattern, Pruned, Pruner
from losa_kernels import unpack_mask


class WrappedBlock:
    """A block, its masked-LoRA linears by name within it, and the weights that they were given.

    While the model is sharded, all work on a block is done within ``gathered``.

    Args:
        name: full name, for messages.
        module: the block.
        keeps_originals: whether weights that pruning replaces are needed later, as the dense model or to regrow from.
        on_device: of originals that every training step reads: they stay on the device.
    """

    def __init__(self, name: str, module: nn.Module, keeps_originals: bool, on_device: bool = False):
        self.name = name
        self.module = module
        self.linears: dict[str, MaskedLoRALinear] = {
            name: m for name, m in module.named_modules() if isinstance(m, MaskedLoRALinear)
        }
        self.originals = Originals(self.linears, keeps=keeps_originals, stay=on_device)
        self._kept: dict[str, int] | None = None

    def sparsity(self) -> float:
        """Share of pruned weights."""
        total = sum(m.weight.numel() for m in self.linears.values())
        return 1 - sum(self.kept().values()) / total

    def kept(self) -> dict[str, int]:
        """How many weights of each linear are kept, counted from the masks unless ``note_kept`` said it."""
        return {name: count_kept(m) for name, m in self.linears.items()} if self._kept is None else self._kept

    def note_kept(self, kept: dict[str, int]) -> None:
        """Say how many weights of each linear are kept: the masks of an offloaded block do not stay in memory."""
        self._kept = kept

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The block with whole parameters; it is sharded anew, or leaves memory, at the end. All processes enter and
        leave together. It does nothing to a model that is whole in memory."""
        with self.originals.noting(), gathered(self.module):
            yield

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The block as it was before any pruning: original weights and norms, no mask, no adapter."""
        with self.originals.in_place(self.module), dense_mode(self.module):
            yield

    def merged_weights(self) -> dict[str, Tensor]:
        """M * (W + s B A) of every linear, rounded as its layer rounds it."""
        return {name: m.effective_weight() for name, m in self.linears.items()}

    @contextmanager
    def merged(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """The block with its ``merged_weights`` formed once for all batches, or with ``weights``, which were formed
        earlier. Trained norms stay trained."""
        merged = self.merged_weights() if weights is None else weights
        with weights_in_place(self.module, merged), plain_linears(self.module):
            yield

    def prune(
        self,
        pruner: Pruner,
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern | Mapping[str, Pattern],
        nested: bool,
        owners: Mapping[str, int],
    ) -> dict[str, float | None]:
        """Prune the linears that have an owner. Each process decides about its own, and gives masks and weights to all.

        Args:
            statistics: of the linears that this process owns.
            pattern: of the block, or of each linear by name. With the latter a pruner gets one linear at a time.
            nested: what is pruned already stays pruned.
            owners: the process that owns each linear that is to be pruned.

        Returns:
            by full name, the damping of linears that have a Hessian; None where no damping was enough.

        Raises:
            NumericsError: names block and linear.
            ValueError: the pruner did not decide about every linear once, or a mask or weight does not fit its linear.
        """
        mine = [name for name, owner in owners.items() if owner == process_index()]
        # Sharded originals become whole here, where all processes are.
        originals = self.originals.whole(owners) if pruner.updates_weight and not nested else {}
        weights = _WeightsToPrune(self, mine, originals, pruner.updates_weight, nested)
        decided = together(lambda: self._decide(pruner, weights, statistics, pattern, nested) if mine else {})
        damping: dict[str, float | None] = {}
        for name, owner in owners.items():
            layer = self.linears[name]
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
        pattern: Pattern | Mapping[str, Pattern],
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

    def _outcomes(
        self,
        pruner: Pruner,
        weights: _WeightsToPrune,
        statistics: Mapping[str, Tensor | None],
        pattern: Pattern | Mapping[str, Pattern],
        masks: Mapping[str, Tensor | None],
    ) -> Iterator[tuple[str, Pruned]]:
        """``prune_block``, whose errors get the block's name."""
        try:
            if isinstance(pattern, Pattern):
                yield from pruner.prune_block(weights, statistics, pattern, masks)
                return
            pruner.prepare(statistics.values())
            for name in weights:
                own = weights.only(name), {name: statistics[name]}, pattern[name], {name: masks[name]}
                yield from pruner.prune_block(*own)
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
            layer.replace_weight(weight)
            self.originals.replaced(name)
        layer.set_mask(mask)


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

    def only(self, name: str) -> _WeightsToPrune:
        return _WeightsToPrune(self._block, [name], *self._how)

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
