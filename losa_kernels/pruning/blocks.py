"""The column blocks of a sweep, on the operators of csrc/<device>/selection and csrc/<device>/pruning.

Per block: selection, one sweep of all rows, and one product that brings later columns up to date. Inside a panel the
product updates the panel's later columns from the block's errors. At the panel's end it updates all columns right of
the panel from all errors of the panel. The weight is swept in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.bitmask import packed_width
from losa_kernels.pruning.reference import prune_count

NATIVE_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)  # that wanda_select takes
STATE = 4352  # int32s that select_block takes: the bound it found, and on CUDA its histograms


def update_rest(rest: Tensor, errors: Tensor, upper: Tensor) -> None:
    """rest (out, later) -= errors (out, width) upper (width, later), in place."""
    rest.addmm_(errors, upper, alpha=-1)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To TF32's 10 bits after the point, halves away from zero, as sweep_block rounds its errors."""
    return (x.view(torch.int32) + 0x1000).bitwise_and_(~0x1FFF).view(torch.float32)


def split_factor(factor: Tensor, block_size: int) -> Tensor:
    """(3 n, n) of a contiguous factor's first n rows, n a multiple of the block size: of each block its high part, its
    low part and its high part again.

    Multiplied by errors in their high, high and low part, that is three TF32 products in one: high high + high low +
    low high. The missing product low low is at most 3 * 2^-22 of the whole.
    """
    rows = factor[: len(factor) // block_size * block_size]
    parts = rows.new_empty(len(rows) // block_size, 3, block_size, factor.shape[1])
    high = rounded_to_tf32(rows)
    parts[:, 0] = high.view_as(parts[:, 0])
    parts[:, 2] = parts[:, 0]
    parts[:, 1] = rounded_to_tf32(rows - high).view_as(parts[:, 1])
    return parts.view(3 * len(rows), factor.shape[1])


def block_counts(sparsity: float, weight: Tensor, block_size: int, mask: Tensor | None) -> Tensor:
    """``reference.block_counts`` of all column blocks: int64 (blocks,) on the weight's device, without asking it.

    With b the budgets up to each block's end and L the sum of what is lost up to there, its recurrence
    done = max(b, done before + lost) is done - L = max(b - L, done before - L before): a running maximum.
    """
    rows, columns = weight.shape
    ends = torch.arange(block_size, columns + block_size, block_size, device=weight.device).clamp_(max=columns)
    # Double precision, two roundings: what Python computes in prune_count.
    budgets = (ends * rows).double().mul_(sparsity).add_(1e-6).long()
    lost = torch.zeros_like(ends) if mask is None else torch.ops.losa.pruned_per_block(mask, columns, block_size)
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
    panel: int = 0,
    split: bool = False,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(swept weight (out, in), packed mask, loss (out,)) of an fp32 weight, which is given up: the result may be it.

    ``panel``: columns of a panel, rounded down to whole blocks, at least one. ``split``: what later columns lose comes
    from operands in two TF32 parts each, see ``split_factor``; the products are then to be TF32's. ``counts``:
    ``block_counts``, instead of ``sparsity``.
    """
    rows, columns = weight.shape
    work = weight.contiguous()
    mask = None if mask is None else mask.contiguous()
    kept = work.new_zeros(rows, packed_width(columns), dtype=torch.uint8)
    loss = work.new_zeros(rows)
    panel = max(panel // block_size, 1) * block_size
    parts, right = (3, split_factor(factor, block_size)) if split else (1, factor)
    space = work.new_empty(rows * parts * min(panel, columns))
    starts = range(0, columns, block_size)
    scratch, state = None, None
    if keep_n is None and columns:
        scratch = work.new_empty(rows * min(block_size, columns))
        state = work.new_zeros(STATE, dtype=torch.int32)
        if counts is None:
            assert sparsity is not None
            counts = block_counts(sparsity, work, block_size, mask)
    group, prune = (0, 0) if keep_n is None or m is None else (m, m - keep_n)
    for index, start in enumerate(starts):
        end = min(start + block_size, columns)
        first = start // panel * panel
        last = min(first + panel, columns)
        errors = space[: rows * parts * (last - first)].view(rows, parts * (last - first))
        own = errors[:, parts * (start - first) : parts * (end - first)]
        if state is not None:
            torch.ops.losa.select_block(work, factor, start, end, counts, index, mask, scratch, state)
        torch.ops.losa.sweep_block(work, factor, start, end, group, prune, state, mask, kept, own, loss)
        if end < last:
            update_rest(work[:, end:last], own, right[parts * start : parts * end, end:last])
        elif end < columns:
            update_rest(work[:, end:], errors, right[parts * first : parts * end, end:])
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
    if keep_n is None or m is None:
        assert sparsity is not None
        count, group = prune_count(sparsity, weight.shape[1]), 0
    else:
        count, group = m - keep_n, m
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

    @torch.library.register_fake("losa::factor_panel")
    def _(matrix, start, end, inverse, failed):
        return None
