"""SparseGPT's column sweep and Wanda's selection in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from losa_kernels.bitmask import pack_mask, unpack_mask

MAX_DAMPING = 1.0


class SingularHessianError(ValueError):
    """The Hessian stays singular however much damping is added."""


def prune_count(sparsity: float, total: int) -> int:
    """floor(sparsity * total), where a product that is an integer but for rounding counts as that integer."""
    return int(sparsity * total + 1e-6)


def smallest(scores: Tensor, counts: Tensor) -> Tensor:
    """Bool (rows, n): in row i exactly ``counts[i]`` entries with the smallest scores, ties lowest column first."""
    limit = int(counts.max()) if counts.numel() else 0
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if limit == 0:
        return chosen
    low = scores.topk(limit, dim=1, largest=False, sorted=True).values
    threshold = low.gather(1, (counts.clamp_min(1) - 1)[:, None])
    below = scores < threshold
    tied = scores == threshold
    room = counts[:, None] - below.sum(1, keepdim=True)
    chosen = below | (tied & (tied.cumsum(1) <= room))
    return chosen & (counts > 0)[:, None]


def smallest_of_groups(scores: Tensor, prune_n: int, m: int) -> Tensor:
    """Bool (rows, n): exactly ``prune_n`` of every ``m`` consecutive entries of a row, ties lowest column first."""
    groups = scores.reshape(-1, m)
    counts = torch.full((len(groups),), prune_n, device=scores.device)
    return smallest(groups, counts).reshape(scores.shape)


def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    mask: Tensor | None,
) -> Tensor:
    """Score |W_ij| ||X_j||, smallest pruned per row; already pruned entries score below everything."""
    scores = weight.abs() * input_norms.to(weight.dtype)
    gone = None
    if mask is not None:
        gone = ~unpack_mask(mask, weight.shape[1])
        scores = scores.masked_fill_(gone, -1)
    if keep_n is not None:
        pruned = smallest_of_groups(scores, m - keep_n, m)
    else:
        count = prune_count(sparsity, weight.shape[1])
        counts = torch.full((weight.shape[0],), count, device=weight.device)
        pruned = smallest(scores, counts)
    if gone is not None:
        pruned |= gone
    return pack_mask(~pruned)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of the damped H^-1 = U^T U, and the damping used (a share of the mean diagonal).

    U = inv(flip(chol(flip(H)))). Every attempt starts from a fresh copy; damping grows tenfold until it succeeds.
    """
    mean = hessian.diagonal().mean()
    while damping <= MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            upper = lower.flip(0, 1)
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            factor = torch.linalg.solve_triangular(upper, identity, upper=True)
            if torch.isfinite(factor).all():
                return factor, damping
        damping *= 10
    raise SingularHessianError(f"hessian: singular even with damping {damping / 10:g} of its mean diagonal")


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    block_size: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, kept, loss) after the sweep over column blocks; ``weight`` is changed in place."""
    rows, columns = weight.shape
    gone = None if mask is None else ~unpack_mask(mask, columns)
    kept = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    loss = torch.zeros(rows, dtype=weight.dtype, device=weight.device)
    pruned_so_far = 0
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block = weight[:, start:end]
        upper = factor[start:end, start:end]
        diagonal = upper.diagonal()
        already = None if gone is None else gone[:, start:end]
        pruned = None
        if keep_n is None:
            # The budget up to this block's end, so that remainders of floor() never add up.
            count = prune_count(sparsity, rows * end) - pruned_so_far
            pruned = _select_block(block, diagonal, count, already)
            pruned_so_far += int(pruned.sum())
        errors = torch.empty_like(block)
        current = block.T.contiguous()
        if pruned is None:
            pruned = torch.zeros_like(block, dtype=torch.bool)
        for i in range(end - start):
            if keep_n is not None and i % m == 0:
                scores = (current[i : i + m].T / diagonal[i : i + m]).square()
                if already is not None:
                    scores.masked_fill_(already[:, i : i + m], -1)
                chosen = smallest_of_groups(scores.contiguous(), m - keep_n, m)
                pruned[:, i : i + m] = chosen if already is None else chosen | already[:, i : i + m]
            column = current[i]
            error = torch.where(pruned[:, i], column / diagonal[i], 0)
            if i + 1 < end - start:
                current[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
            errors[:, i] = error
        block.copy_(current.T)
        block.masked_fill_(pruned, 0)
        kept[:, start:end] = ~pruned
        loss += errors.square().sum(1) / 2
        if end < columns:
            weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return weight, kept, loss


def _select_block(block: Tensor, diagonal: Tensor, count: int, already: Tensor | None) -> Tensor:
    """Exactly ``count`` entries of the whole block (more where more are pruned already): smallest W^2 / U_jj^2, ties
    by lowest column, then lowest row."""
    scores = (block / diagonal).square_()
    if already is not None:
        scores.masked_fill_(already, -1)
        count = max(count, int(already.sum()))
    by_column = scores.T.reshape(1, -1)
    count = min(max(count, 0), by_column.shape[1])
    chosen = smallest(by_column, torch.tensor([count], device=block.device))
    return chosen.reshape(block.shape[1], block.shape[0]).T.contiguous()
