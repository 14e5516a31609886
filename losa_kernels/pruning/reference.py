"""SparseGPT's column sweep and Wanda's selection in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losa_kernels.bitmask import pack_mask, unpack_mask
from losa_kernels.tensors import all_finite, wide_dtype

MAX_DAMPING = 1.0
BAD_NORMS, BAD_WEIGHT = 1, 2  # faults of Wanda's arguments, as csrc/cuda/pruning/wanda.cu tells them


class SingularHessianError(ValueError):
    """The Hessian stays singular however much damping is added."""


def prune_count(sparsity: float, total: int) -> int:
    """floor(sparsity * total), where a product that is an integer but for rounding counts as that integer."""
    return int(sparsity * total + 1e-6)


def block_counts(sparsity: float, rows: int, widths: list[int], gone: list[int]) -> list[int]:
    """How many entries go from each column block, ``gone`` of which are pruned already.

    The budget runs up to each block's end, so that remainders of floor() never add up, and leaves room for what later
    blocks have lost already. The sum is max(floor(sparsity * rows * sum(widths)), sum(gone)).
    """
    total = prune_count(sparsity, rows * sum(widths))
    later, end, done = sum(gone), 0, 0
    counts = []
    for width, lost in zip(widths, gone, strict=True):
        later -= lost
        end += width
        budget = min(prune_count(sparsity, rows * end), total - later)
        counts.append(max(budget - done, lost))
        done += counts[-1]
    return counts


def smallest(scores: Tensor, count: int) -> Tensor:
    """Bool (rows, n): exactly ``count`` entries of each row with the smallest scores, ties lowest column first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":
        threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    else:
        # Under torch.use_deterministic_algorithms some versions of torch refuse kthvalue on CUDA.
        threshold = scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    below, tied = scores < threshold, scores == threshold
    room = count - below.sum(1, keepdim=True, dtype=torch.int32)
    return below | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))


def smallest_of_groups(scores: Tensor, count: int | Tensor) -> Tensor:
    """Bool (m, groups): exactly ``count`` of the m entries of each column of ``scores``, ties lowest row first.

    ``count`` is one number, or (groups,). An entry's rank is the number of entries that go before it.
    """
    rank = torch.zeros_like(scores, dtype=torch.int32)
    for j, score in enumerate(scores):
        rank[:j] += score < scores[:j]
        rank[j + 1 :] += score <= scores[j + 1 :]
    return rank < count


def raise_faults(faults: int) -> None:
    """ValueError for the first of Wanda's arguments that has a fault."""
    if faults & BAD_NORMS:
        raise ValueError("input_norms: expected finite values >= 0")
    if faults & BAD_WEIGHT:
        raise ValueError("weight: expected finite values, got nan or inf")


def check_values(weight: Tensor, input_norms: Tensor) -> None:
    """ValueError unless the norms, as scores use them, are finite and >= 0 and the weight is finite."""
    norms = input_norms.to(wide_dtype(weight.dtype))
    if not all_finite(norms) or bool((norms < 0).any()):
        raise_faults(BAD_NORMS)
    if not all_finite(weight):
        raise_faults(BAD_WEIGHT)


def scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """Wanda's |W_ij| ||X_j||, (out, in) fp32 (fp64 for fp64), a new tensor."""
    wide = wide_dtype(weight.dtype)
    return weight.to(wide, copy=True, memory_format=torch.contiguous_format).abs_().mul_(input_norms.to(wide))


def wanda_mask(
    weight: Tensor,
    input_norms: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    mask: Tensor | None,
) -> Tensor:
    """Score |W_ij| ||X_j||, smallest pruned per row; already pruned entries score below everything."""
    check_values(weight, input_norms)
    rows, columns = weight.shape
    found, gone = scores(weight, input_norms), None
    if mask is not None:
        gone = ~unpack_mask(mask, columns)
        found.masked_fill_(gone, -1)
    if keep_n is None or m is None:
        assert sparsity is not None
        pruned = smallest(found, prune_count(sparsity, columns))
    else:
        groups = found.reshape(-1, m).T.contiguous()
        pruned = smallest_of_groups(groups, m - keep_n).T.reshape(rows, columns)
    if gone is not None:
        pruned |= gone
    return pack_mask(~pruned)


def invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def damped_diagonal(hessian: Tensor, damping: float) -> Tensor:
    """Diagonal with zeros as 1, plus ``damping`` of its mean."""
    diagonal = hessian.diagonal().clone()
    diagonal.masked_fill_(diagonal == 0, 1)
    return diagonal + damping * diagonal.mean()


def singular(damping: float) -> SingularHessianError:
    return SingularHessianError(f"hessian: singular even with damping {damping:g} of its mean diagonal")


def factor_with(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    """U = inv(flip(chol(flip(H)))) of H with another diagonal; None where there is none."""
    flipped = hessian.flip(0, 1)
    flipped.diagonal().copy_(diagonal.flip(0))
    lower, info = torch.linalg.cholesky_ex(flipped)
    return invert_upper(lower.flip(0, 1)) if int(info) == 0 else None


def inverse_factor(
    hessian: Tensor, damping: float, attempt: Callable[[Tensor, Tensor], Tensor | None] = factor_with
) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of the damped H^-1 = U^T U, and the damping used (a share of the mean diagonal).

    Zeros on the diagonal count as 1. Every attempt starts from the given diagonal; damping grows tenfold until it
    succeeds. ``attempt``: as ``factor_with``.
    """
    last = damping
    # The margin admits a last step whose product of tens is 1 but for rounding.
    while damping <= MAX_DAMPING * (1 + 1e-9):
        factor = attempt(hessian, damped_diagonal(hessian, damping))
        if factor is not None and all_finite(factor):
            return factor, damping
        del factor  # the next attempt needs the memory
        last, damping = damping, 10 * damping
    raise singular(last)


def inverse_factors(
    hessians: Sequence[Tensor], damping: float, attempt: Callable[[Tensor, Tensor], Tensor | None] = factor_with
) -> list[tuple[Tensor, float] | SingularHessianError]:
    """:func:`inverse_factor` of each Hessian, or its error."""
    found: list[tuple[Tensor, float] | SingularHessianError] = []
    for hessian in hessians:
        try:
            found.append(inverse_factor(hessian, damping, attempt))
        except SingularHessianError as error:
            # Its traceback would keep all Hessians alive.
            found.append(error.with_traceback(None))
    return found


def column_sweep(
    weight: Tensor,
    factor: Tensor,
    sparsity: float | None,
    keep_n: int | None,
    m: int | None,
    block_size: int,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(swept weight (out, in), packed mask, loss (out,)); ``weight`` is not changed.

    Works on the transposed matrix: a column of W, the unit of the sweep, is then contiguous.
    """
    rows, columns = weight.shape
    work = weight.T.clone(memory_format=torch.contiguous_format)
    pruned = torch.zeros(columns, rows, dtype=torch.bool, device=weight.device)
    gone = None if mask is None else (~unpack_mask(mask, columns)).T.contiguous()
    loss = torch.zeros(rows, dtype=weight.dtype, device=weight.device)
    starts = range(0, columns, block_size)
    counts: list[int] = []
    if keep_n is None:
        assert sparsity is not None
        widths = [min(block_size, columns - start) for start in starts]
        lost = [0] * len(widths) if gone is None else [int(gone[i : i + block_size].sum()) for i in starts]
        counts = block_counts(sparsity, rows, widths, lost)
    for index, start in enumerate(starts):
        end = min(start + block_size, columns)
        block, chosen = work[start:end], pruned[start:end]
        already = None if gone is None else gone[start:end]
        upper = factor[start:end, start:end]
        diagonal = upper.diagonal()[:, None]
        if keep_n is None:
            # Flattened column by column, so that ties go to the lowest column, then to the lowest row.
            scores = _scores(block, diagonal, already).reshape(1, -1)
            chosen.copy_(smallest(scores, counts[index]).reshape(chosen.shape))
        errors = torch.empty_like(block)
        for i in range(end - start):
            if keep_n is not None and m is not None and i % m == 0:
                group = slice(i, i + m)
                taken = None if already is None else already[group]
                chosen[group] = smallest_of_groups(_scores(block[group], diagonal[group], taken), m - keep_n)
                if taken is not None:
                    chosen[group] |= taken
            errors[i] = torch.where(chosen[i], block[i] / diagonal[i], 0)
            block[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        loss += errors.square().sum(0) / 2
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return work.masked_fill_(pruned, 0).T.contiguous(), pack_mask(~pruned.T), loss


def _scores(block: Tensor, diagonal: Tensor, already: Tensor | None) -> Tensor:
    """W^2 / U_jj^2 of some columns (columns, rows); what is pruned already scores below everything."""
    scores = (block / diagonal).square_()
    return scores if already is None else scores.masked_fill_(already, -1)
