"""A pruning problem, and the official manner of solving it in our own words: full sorts, a Python loop over columns, a
three-step factor."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = {"50 %": (0.5, None, None), "2:4": (None, 2, 4)}
SHAPES = [(1536, 576), (576, 1536), (4096, 4096)]


def problem(out_features: int, in_features: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of 4 in inputs whose scales differ a hundredfold and which are correlated."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=device)
    scales = torch.logspace(-1, 1, in_features, device=device)[
        torch.randperm(in_features, generator=generator, device=device)
    ]
    x = torch.randn(4 * in_features, in_features, generator=generator, device=device) * scales
    x += torch.randn(4 * in_features, 1, generator=generator, device=device)
    return weight, x.T @ x


def official_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Upper Cholesky factor of H^-1: factor, inverse, factor."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def official_block_selection(block: Tensor, diagonal: Tensor, sparsity: float) -> Tensor:
    """Bool like ``block``, pruned entries: a threshold by a full sort."""
    scores = block**2 / diagonal**2
    threshold = scores.flatten().sort()[0][int(scores.numel() * sparsity)]
    return scores <= threshold


def official_sweep(
    weight: Tensor, factor: Tensor, sparsity: float | None, keep_n: int | None, m: int | None, block_size: int = 128
) -> Tensor:
    """Swept weight (out, in): threshold by a full sort of each block, one column after another, trailing product."""
    work = weight.clone()
    columns = work.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, swept = work[:, start:stop].clone(), torch.zeros_like(work[:, start:stop])
        errors = torch.zeros_like(block)
        local = factor[start:stop, start:stop]
        if m is None:
            pruned = official_block_selection(block, local.diagonal(), sparsity)
        else:
            pruned = torch.zeros_like(block, dtype=torch.bool)
        for i in range(stop - start):
            column, diagonal = block[:, i], local[i, i]
            if m is not None and i % m == 0:
                scores = block[:, i : i + m] ** 2 / local.diagonal()[i : i + m] ** 2
                pruned.scatter_(1, i + scores.topk(m - keep_n, dim=1, largest=False)[1], True)
            kept = column.clone()
            kept[pruned[:, i]] = 0
            swept[:, i] = kept
            error = (column - kept) / diagonal
            block[:, i:] -= error[:, None].matmul(local[i, i:][None])
            errors[:, i] = error
        work[:, start:stop] = swept
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work


def trailing_products(weight: Tensor, factor: Tensor, block_size: int = 128, panel: int = 128) -> None:
    """The trailing updates alone, the part of a sweep that is the vendor's product on either side: inside a panel after
    every block, right of it once."""
    work, columns = weight.clone(), weight.shape[1]
    errors = torch.ones(weight.shape[0], panel, dtype=weight.dtype, device=weight.device)
    for stop in range(block_size, columns, block_size):
        first = (stop - 1) // panel * panel
        last = first + panel
        if stop < last:
            end = min(last, columns)
            work[:, stop:end].addmm_(errors[:, :block_size], factor[stop - block_size : stop, stop:end], alpha=-1)
        else:
            work[:, stop:].addmm_(errors, factor[first:stop, stop:], alpha=-1)


def official_wanda(weight: Tensor, norms: Tensor, sparsity: float | None, keep_n: int | None, m: int | None) -> Tensor:
    """Kept weights as bool (out, in): a stable sort of every row and a scatter, or topk for every group."""
    scores = weight.abs() * norms
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    if m is None:
        order = torch.sort(scores, dim=-1, stable=True)[1]
        return ~pruned.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    for column in range(0, scores.shape[1], m):
        group = scores[:, column : column + m].float()
        pruned.scatter_(1, column + group.topk(m - keep_n, dim=1, largest=False)[1], True)
    return ~pruned
