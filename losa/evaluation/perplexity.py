"""Perplexity as the pruning papers measure it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from losa.data.sequences import IGNORED
from losa.distributed import watch
from losa.distributed.collectives import share_of
from losa.distributed.offloading import is_offloaded
from losa.distributed.processes import from_everyone, is_main, process_count
from losa.distributed.sharding import device_of, sharding_of
from losa.distributed.stop import check
from losa.distributed.together import together
from losa.distributed.turns import everywhere
from losa.errors import DataError, NumericsError
from losa.model.block_passes import BlockPasses
from losa.model.blocks import find_blocks
from losa.model.flops import hidden_size
from losa.model.limits import check_ids, check_length
from losa.model.running import evaluating, runnable
from losa.training.loss import TokenLoss, label_positions

logger = logging.getLogger("losa")

# In nats. A model that does not need the first token loses a hundredth of this without one token of context.
_START_MATTERS = 0.2
# Bytes of hidden states that wait on the host at a time, of a model whose blocks are offloaded.
HIDDEN_BYTES = 4 << 30
# Batches of a process that holds the whole model, between two looks at whether a signal asks to stop.
_BETWEEN_CHECKS = 8


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(``nll``), ``nll`` the mean in nats over windows x (length - 1) predicted tokens; ``tokens``: the
    text that was read, windows x length (length - 1 where each window begins with a token of its own)."""

    value: float
    nll: float
    windows: int
    tokens: int
    length: int


def evaluation_windows(tokens: Tensor, length: int, max_windows: int | None = None, bos: int | None = None) -> Tensor:
    """(windows, length) int64: the text ``tokens`` (tokens,) in non-overlapping windows; the tail is dropped.

    ``bos`` goes in front of each window, which then holds length - 1 tokens of the text. A ``bos`` with which the text
    itself begins is left out.

    Raises:
        DataError: less text than one window.
    """
    if bos is not None and len(tokens) and tokens[0] == bos:
        tokens = tokens[1:]
    width = length - (bos is not None)
    count = len(tokens) // width
    if count == 0:
        raise DataError(f"evaluate.data: {len(tokens)} tokens are less than one window of evaluate.length, {length}")
    if max_windows is not None:
        count = min(count, max_windows)
    windows = tokens[: count * width].reshape(count, width)
    return windows if bos is None else torch.cat([windows.new_full((count, 1), bos), windows], dim=1)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = False,
    bos: int | None = None,
) -> Perplexity:
    """exp(mean NLL) over non-overlapping windows of ``length`` tokens; the tail is dropped.

    Each window predicts its tokens 2..length from the window alone, as in the code of SparseGPT and Wanda. All windows
    weigh the same, for all have the same number of predictions. The model computes in its own dtype, the loss in fp32.
    Several processes share the batches out; every process returns the value that one process would, but for kernels
    that processes choose by measurement, and that round differently.

    Windows have no beginning-of-text token of their own, so that values can be compared with the papers' values. Some
    models (Gemma) are far worse without such a token than they are in use. ``bos`` gives each window one; the values
    are then comparable only among themselves.

    Args:
        model: causal LM; set to evaluation mode and put back.
        tokens: (tokens,) int64, of ``losa.data.tokens.evaluation_tokens``.
        batch_size: windows per forward pass.
        max_windows: use only the first windows.
        progress: show a progress bar (in a terminal only).
        bos: a token to begin each window with, not predicted; the window holds length - 1 tokens of text then.

    Raises:
        Stopped: between batches, if a signal asks for it.
        DataError: less text than one window.
        ModelError: windows longer than the model's table of positions, or tokens that it has no embedding for.
        NumericsError: a non-finite loss; names the windows.
        ValueError: length below 2, batch_size or max_windows below 1.
    """
    for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    windows = evaluation_windows(tokens, length, max_windows, bos)
    check_length(model, length, "evaluate.length")
    check_ids(model, windows, "evaluate.data")
    count = len(windows)
    with evaluating(model):
        if is_offloaded(model):
            sums = _sums_by_block(model, [(batch, batch) for batch in windows.split(batch_size)])
        else:
            with runnable(model):
                sums = _batch_sums(model, windows, batch_size, progress)
    total = 0.0
    for first, summed in zip(range(0, count, batch_size), sums, strict=True):
        if not math.isfinite(summed):
            last = min(first + batch_size, count) - 1
            where = f"windows {first}..{last}" if last > first else f"window {first}"
            raise NumericsError(f"evaluation: the loss is {summed} in {where} of {count}")
        total += summed
    nll = total / (count * (length - 1))
    return Perplexity(_exp(nll), nll, count, count * (length - (bos is not None)), length)


def _batch_sums(model: nn.Module, windows: Tensor, batch_size: int, progress: bool) -> list[float]:
    """The summed loss of every batch of windows, in order. Each process runs its share of the batches."""
    batches = windows.split(batch_size)
    mine = share_of(len(batches))
    most, sharded = -(-len(batches) // process_count()), sharding_of(model) is not None
    # Processes that hold a model in shards make the same calls: a process with a batch less repeats one, whose loss
    # does not count.
    calls = most if sharded else len(mine)
    device = device_of(model)

    # A sharded model's forward pass is full of collective calls. An error there leaves this function at once, and the
    # watch over the processes names it: who caught it here would wait for processes that wait in those calls.
    loss = TokenLoss(model) if sharded else everywhere(lambda: TokenLoss(model))
    bar = tqdm(range(calls), desc="perplexity", leave=False, disable=None if progress and is_main() else True)

    def run(indices: range) -> list[float]:
        found = []
        for index in indices:
            watch.progress(f"perplexity, batch {index + 1} of {calls}")
            batch = batches[min(mine.start + index, len(batches) - 1)]
            found.append(_summed(loss, batch, batch, device))
            bar.update()
        return found[: max(len(mine) - indices.start, 0)]

    found: list[list[list[float]]] = []  # by look, by process
    with bar:
        # A pass of a sharded model takes far longer than a look.
        step = 1 if sharded else _BETWEEN_CHECKS
        for first in range(0, most, step):
            check()
            part = partial(run, range(first, min(first + step, calls)))
            found.append([part()] if sharded else together(part))
    if sharded:
        found = [from_everyone([summed for (own,) in found for summed in own])]
    return [summed for process in zip(*found, strict=True) for own in process for summed in own]


def _sums_by_block(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The summed loss of every batch, ids and labels, of a model whose blocks are offloaded. The blocks are read once
    for as many batches as have hidden states of ``HIDDEN_BYTES``."""
    device, width = device_of(model), hidden_size(model) * next(model.parameters()).element_size()
    at_a_time = max(1, HIDDEN_BYTES // (batches[0][0].numel() * width))
    groups = (batches[first : first + at_a_time] for first in range(0, len(batches), at_a_time))
    return [summed for group in groups for summed in _sums_of_group(model, group, device)]


def _sums_of_group(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> list[float]:
    passes = BlockPasses(model, find_blocks(model), [ids for ids, _ in batches])
    with passes.skipped():
        loss = TokenLoss(model)
    found = []
    for number, (ids, labels) in enumerate(batches):
        watch.progress(f"perplexity, the loss of batch {number + 1} of {len(batches)}")
        check()
        with passes.ended(number):
            found.append(_summed(loss, ids, labels, device))
    return found


def _summed(loss: TokenLoss, ids: Tensor, labels: Tensor, device: torch.device) -> float:
    """The loss of a batch (windows, length) on the host, summed over its labels."""
    return loss(*(tensor.to(device) for tensor in (ids, *label_positions(labels)))).item()


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < math.log(torch.finfo(torch.float64).max) else math.inf


def window_start(tokenizer, what: str) -> int:
    """The beginning-of-text token, for windows that begin with it. Raises DataError; names the setting ``what``."""
    if tokenizer.bos_token_id is None:
        raise DataError(f"{what}: the tokenizer has no beginning-of-text token")
    return tokenizer.bos_token_id


@torch.no_grad()
def warn_of_missing_start(model: nn.Module, tokenizer, tokens: Tensor, length: int) -> None:
    """Warn where windows lack a beginning-of-text token that matters: the tokenizer puts the token in front of the
    whole text, and with it the second window's tokens are likelier by more than ``_START_MATTERS``."""
    bos = tokenizer.bos_token_id
    if bos is None or len(tokens) < 2 * length or length < 3 or tokens[0] != bos:
        return
    text = tokens[length : 2 * length - 1]
    started = torch.cat([text.new_tensor([bos]), text])
    labels = started.clone()
    # Both texts are asked for the same tokens.
    labels[1] = IGNORED
    both = [(text[None], text[None]), (started[None], labels[None])]
    with evaluating(model):
        if is_offloaded(model):
            sums = _sums_by_block(model, both)
        else:
            with runnable(model):
                loss, device = TokenLoss(model), device_of(model)
                sums = [_summed(loss, ids, labels, device) for ids, labels in both]
    without, within = (each / (len(text) - 1) for each in sums)
    if without - within > _START_MATTERS:
        logger.warning(
            "evaluation: windows after the first lack the beginning-of-text token that this model is used with: the "
            "second one's perplexity is %.4g with it and %.4g without. --bos (evaluate.bos_per_window: true) gives it "
            "to each window",
            *(_exp(within), _exp(without)),
        )
