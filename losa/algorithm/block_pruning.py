"""One block pruned: the statistics of its linears' inputs, in as many passes as memory for them asks for, and what the
pruner makes of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from losa.algorithm.block import WrappedBlock
from losa.algorithm.block_rates import Decided
from losa.algorithm.gradient_statistics import GradientStatistic
from losa.algorithm.gradients import REGROWTH, Gradients, wanted_gradients
from losa.algorithm.linear_rates import LinearRates, rates_within
from losa.algorithm.owners import owners_of
from losa.algorithm.regrowth import Regrowing
from losa.algorithm.row_scales import ByRows
from losa.algorithm.statistics import Statistic, collect, fed_together, statistic_of
from losa.algorithm.stopwatch import Stopwatch
from losa.algorithm.stream import BlockStream
from losa.distributed.processes import is_main
from losa.distributed.turns import everywhere
from losa.distributed.watch import progress
from losa.errors import RecipeError
from losa.model.blocks import expert_lists
from losa.modules.linear_experts import RoutedExperts, every_token_to_every_expert
from losa.modules.masked_lora import MaskedLoRALinear
from losa.pruners.base import Pattern, Pruner
from losa.recipe.sections import AllocationConfig, CalibrationConfig, PruneConfig

GB = 10**9
logger = logging.getLogger("losa")


@dataclass(frozen=True)
class PrunedBlock:
    """``damping``: by full name (``WrappedBlock.prune``). ``linears``: rates of the block's linears where they differ.
    ``expert_tokens``: as in ``losa.record.RoundRecord``, of this block."""

    damping: dict[str, float | None]
    linears: LinearRates | None
    expert_tokens: dict[str, list[int]]


class BlockPruning:
    """Prunes block after block of a wrapped model.

    Args:
        prune: the recipe's section, as is ``allocation``.
        pruner: the recipe's.
        calibration: the recipe's section. Statistics of a block beyond ``statistics_gb`` are taken in several passes,
            those of linears that share an input in one.

    ``statistic``: what the pruner names; ``gradients``: the statistics of gradients that the recipe takes
    (``wanted_gradients``).

    Raises:
        RecipeError: a statistic that is unknown.
    """

    def __init__(
        self, prune: PruneConfig, allocation: AllocationConfig, pruner: Pruner, calibration: CalibrationConfig
    ):
        self._prune, self._allocation, self._pruner = prune, allocation, pruner
        self._budget, self._all_tokens = calibration.statistics_gb * GB, calibration.experts == "all"
        self.statistic = statistic_of(prune, pruner)
        self.gradients = wanted_gradients(prune, pruner)

    def prune(
        self,
        index: int,
        block: WrappedBlock,
        stream: BlockStream,
        rates: Decided,
        gradients: Gradients | None,
        later: float,
        watch: Stopwatch,
    ) -> PrunedBlock:
        """Prune a block on its inputs in ``stream``. Several processes call it together, within ``block.gathered``.

        Args:
            rates: of the round, as are ``gradients`` and ``later``, which weighs regrowth.
            watch: gets the stages "forward" and "prune".
        """
        with watch.stage("forward"):
            parts = self._parts(index, block, stream)
            # A pass for later linears runs the block as it was.
            before = everywhere(block.merged_weights) if len(parts) > 1 else None
        damping: dict[str, float | None] = {}
        tokens: dict[str, int] = {}
        linears = None if rates.linears is None else rates.linears[index]
        for number, names in enumerate(parts):
            with watch.stage("forward"):
                # Each part begins with another process, as each block does.
                statistics, owners, seen = self._statistics(index, number, block, names, stream, gradients, before)
                tokens |= seen
                if number == len(parts) - 1:
                    before = None
            with watch.stage("prune"):
                progress(f"pruning {block.name}")
                own: Pattern | dict[str, Pattern] = rates.patterns[index]
                if linears is None and self._allocation.per == "linear":
                    linears = self._rates_within(block, statistics, owners, rates.patterns[index])
                if linears is not None:
                    own = linears.patterns
                pruner = self._pruner_of(block, owners, linears, gradients, later)
                damping |= block.prune(pruner, statistics, own, self._prune.decisions_nested, owners)
            del statistics, pruner
        return PrunedBlock(damping, linears, _of_experts(block, tokens))

    def _parts(self, index: int, block: WrappedBlock, stream: BlockStream) -> Sequence[Sequence[str]]:
        """The linears, in parts whose statistics are taken in one pass each. All linears are one part for a pruner that
        decides about all of them together, and where their rates depend on each other."""
        every = list(block.linears)
        statistic, alone = self.statistic, type(self._pruner).prune_block is Pruner.prune_block
        if statistic is None or issubclass(statistic, GradientStatistic):
            return [every]
        if not alone or self._allocation.per != "block":
            return [every]
        sizes = {name: _bytes(statistic, layer.in_features) for name, layer in block.linears.items()}
        if sum(sizes.values()) <= self._budget:
            return [every]

        def run() -> None:
            with block.merged(), self._seeing(block):
                next(stream.run(index), None)

        parts: list[list[str]] = []
        size = 0.0
        for group in fed_together(block.linears, block.name, lambda: stream.position, run):
            own = sizes[group[0]]
            if not parts or size + own > self._budget:
                parts.append([])
                size = 0
            parts[-1] += group
            size += own
        return parts

    def _statistics(
        self,
        index: int,
        number: int,
        block: WrappedBlock,
        names: Sequence[str],
        stream: BlockStream,
        gradients: Gradients | None,
        weights: dict[str, Tensor] | None,
    ) -> tuple[Mapping[str, Tensor | None], dict[str, int], dict[str, int]]:
        """What the pruner asks for of each of these linears that this process owns, None where it asks for nothing;
        their owners; and the tokens that they saw, where statistics are of their inputs. ``number``: of the part;
        ``weights``: of ``WrappedBlock.merged``."""
        linears, statistic = {name: block.linears[name] for name in names}, self.statistic
        owners = partial(owners_of, linears=linears, pruner=self._pruner, index=index + number)
        if statistic is None:
            return dict.fromkeys(linears), owners([[name] for name in linears]), {}
        if issubclass(statistic, GradientStatistic):
            alone, key = owners([[name] for name in linears]), next(iter(self.gradients))
            assert gradients is not None
            return gradients.of_block(key, block.name, alone), alone, {}

        def run() -> None:
            with block.merged(weights), self._seeing(block):
                deque(stream.run(index), maxlen=0)

        found = collect(linears, statistic, block.name, lambda: stream.position, run, owners)
        return found.statistics, found.owners, found.tokens

    def _seeing(self, block: WrappedBlock) -> AbstractContextManager:
        """Within the context experts see what their statistics are to be taken of."""
        return every_token_to_every_expert(block.module) if self._all_tokens else nullcontext()

    def _rates_within(
        self,
        block: WrappedBlock,
        statistics: Mapping[str, Tensor | None],
        owners: Mapping[str, int],
        pattern: Pattern,
    ) -> LinearRates:
        assert pattern.sparsity is not None, "the recipe's checks saw to it"
        nested, delta = self._prune.rates_nested, self._allocation.linear_delta
        return rates_within(block, statistics, owners, pattern.sparsity, nested, delta)

    def _pruner_of(
        self,
        block: WrappedBlock,
        owners: dict[str, int],
        linears: LinearRates | None,
        gradients: Gradients | None,
        later: float,
    ) -> Pruner:
        """The pruner; where rows have rates of their own, one that compares them by their scales; where weights of the
        block may come back by gradient, one that exchanges them."""
        pruner = self._pruner
        if linears is not None and linears.scales:
            of_gradients = self.statistic is not None and issubclass(self.statistic, GradientStatistic)
            pruner = ByRows(pruner, linears.scales, of_gradients)
        if gradients is None or not gradients.has(REGROWTH):
            return pruner
        share = self._prune.regrow_share * later
        return Regrowing(pruner, gradients.of_block(REGROWTH, block.name, owners), share)


def _of_experts(block: WrappedBlock, tokens: Mapping[str, int]) -> dict[str, list[int]]:
    """Tokens of each expert, by full name of the experts' list, from those of linears by name within the block."""
    lists = expert_lists(block.module)
    found: dict[str, list[int]] = {}
    for name, experts in block.module.named_modules():
        if experts in lists:
            assert isinstance(experts, nn.ModuleList)
            own = [[n for n in tokens if n.startswith(f"{name}.{number}.")] for number in range(len(experts))]
            if all(own):
                found[f"{block.name}.{name}"] = [tokens[linears[0]] for linears in own]
    return found


def check_experts(blocks: Iterable[WrappedBlock], calibration: CalibrationConfig) -> None:
    """Raises RecipeError where experts cannot see all tokens, which ``calibration`` asks for: only those that chose
    them reach their module."""
    if calibration.experts != "all":
        return
    for block in blocks:
        for experts in expert_lists(block.module):
            if not isinstance(experts, RoutedExperts):
                raise RecipeError(
                    f"calibration.experts: all: experts of {block.name} are given the tokens that chose them alone"
                )


def warn_of_few_tokens(expert_tokens: Mapping[str, list[int]], linears: Mapping[str, MaskedLoRALinear]) -> None:
    """Warn, in the main process, of experts with less than a quarter as many tokens as their first linear has inputs.
    ``linears``: by full name."""
    few: list[str] = []
    for name, tokens in expert_tokens.items():
        width = next(m.in_features for full, m in linears.items() if full.startswith(f"{name}.0."))
        few += [f"{name}.{e}: {count} tokens, {width} inputs" for e, count in enumerate(tokens) if 4 * count < width]
    if few and is_main():
        every = sum(map(len, expert_tokens.values()))
        message = "calibration: %d of %d experts saw few tokens (%s); more samples would help"
        logger.warning(message, len(few), every, few[0])


def _bytes(statistic: type[Statistic], in_features: int) -> int:
    """Of one linear's statistic; 0 where it does not say."""
    total = getattr(statistic(in_features, torch.device("meta")), "total", None)
    return total.nbytes if isinstance(total, Tensor) else 0
