"""The column blocks of a sweep, on the operators of csrc/<device>/selection and csrc/<device>/column_sweep.

Per block: selection, one sweep of all rows, one product that brings later columns up to date: those of the block's
panel, and at a panel's end, all errors of the panel together, those right of it. The weight is swept in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.bitmask import packed_width
from losa_kernels.column_sweep.reference import prune_count

NATIVE_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)  # that wanda_select takes
STATE = 4352  # int32s that select_block takes: the bound it found, and on CUDA its histograms


def update_rest(rest: Tensor, errors: Tensor, upper: Tensor) -> None:
    """rest (out, later) -= errors (out, block) upper (block, later), in place."""
    rest.addmm_(errors, upper, alpha=-1)


def block_counts(sparsity: float, weight: Tensor, block_size: int, mask: Tensor | None) -> Tensor:
    """``reference.block_counts`` of all column blocks: int64 (blocks,) on the weight's device, without asking it.

    With b the budgets up to each block's end and L the sum of what is lost up to there, its recurrence
    done = max(b, done before + lost) is done - L = max(b - L, done before - L before): a running maximum.
    """
    rows, columns = weight.shape
    ends = torch.arange(block_size, columns + block_size, block_size, device=weight.device).clamp_(max=columns)
    # Double precision, two roundings: what Python computes in prune_count.
    budgets = (ends * rows).double().mul_(sparsity).add_(1e-6).long()
    if mask is None:
        lost = torch.zeros_like(ends)
    else:
        lost = torch.ops.losa.pruned_per_block(mask, columns, block_size)
    up_to = lost.cumsum(0)
    budgets = budgets.minimum(budgets[-1] - (up_to[-1] - up_to))
    done = up_to + (budgets - up_to).clamp_(min=0).cummax(0).values
    return done.diff(prepend=done.new_zeros(1))


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    block_size: int,
    mask: Tensor | None,
    update: Callable[[Tensor, Tensor, Tensor], None] = update_rest,
    panel: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(swept weight (out, in), packed mask, loss (out,)) of an fp32 weight, which is given up: the result may be it.

    ``panel``: columns of a panel, rounded down to whole blocks, at least one.
    """
    rows, columns = weight.shape
    work = weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    kept = work.new_zeros(rows, packed_width(columns), dtype=torch.uint8)
    loss = work.new_zeros(rows)
    panel = max(panel // block_size, 1) * block_size
    space = work.new_empty(rows * min(panel, columns))
    starts = range(0, columns, block_size)
    scratch, state, counts = None, None, None
    if keep_n is None:
        scratch = work.new_empty(rows * min(block_size, columns))
        state = work.new_zeros(STATE, dtype=torch.int32)
        counts = block_counts(sparsity, work, block_size, mask)
    group, prune = (0, 0) if keep_n is None else (m, m - keep_n)
    for index, start in enumerate(starts):
        end = min(start + block_size, columns)
        first = start // panel * panel
        last = min(first + panel, columns)
        errors = space[: rows * (last - first)].view(rows, last - first)
        own = errors[:, start - first : end - first]
        if state is not None:
            torch.ops.losa.select_block(work, factor, start, end, counts, index, mask, scratch, state)
        torch.ops.losa.sweep_block(work, factor, start, end, group, prune, state, mask, kept, own, loss)
        if end < last:
            update(work[:, end:last], own, factor[start:end, end:last])
        elif end < columns:
            update(work[:, end:], errors, factor[first:end, end:])
    return work, kept, loss


def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    mask: Tensor | None,
    faults: Tensor | None = None,
) -> Tensor:
    """Packed mask of an fp32, fp16 or bf16 weight by |W_ij| ||X_j||; ``faults``: see the operator."""
    count, group = (prune_count(sparsity, weight.shape[1]), 0) if keep_n is None else (m - keep_n, m)
    return torch.ops.losa.wanda_select(weight, input_norms.float(), count, group, mask, faults)


if native.missing("cpu") is None:

    @torch.library.register_fake("losa::wanda_select")
    def _(weight, input_norms, count, m, mask, faults=None):
        return weight.new_empty((weight.shape[0], packed_width(weight.shape[1])), dtype=torch.uint8)

    @torch.library.register_fake("losa::pruned_per_block")
    def _(mask, in_features, block_size):
        if block_size < 1:
            raise ValueError(f"block_size: expected a positive number, got {block_size}")
        return mask.new_empty((-(-in_features // block_size),), dtype=torch.int64)

    @torch.library.register_fake("losa::select_block")
    def _(weight, factor, start, end, counts, index, mask, scratch, state):
        return None

    @torch.library.register_fake("losa::sweep_block")
    def _(weight, factor, start, end, m, prune, state, mask, kept, errors, loss):
        return None
