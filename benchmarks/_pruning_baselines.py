"""A pruning problem, and the official manner of solving it in our own words: full sorts, a Python loop over columns, a
factor in three steps, and two Gram matrices for each pair of blocks."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks._problems import ONLY_THESE_SHAPES, sizes

PATTERNS = {"50 %": (0.5, None, None), "2:4": (None, 2, 4)}  # sparsity, or kept weights and group size
SHAPES = [(1536, 576), (576, 1536), (4096, 4096)]
BLOCK = 128  # columns of a block of the sweep


def add_shape_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=sizes(2), metavar="OUTxIN", **ONLY_THESE_SHAPES)


def shapes_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    return args.shape or (SHAPES[:2] if args.quick else SHAPES)


def problem(out_features: int, in_features: int, device: str) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and a Hessian (in, in), both fp32.

    The Hessian comes from 4 * in inputs, which are correlated and whose scales differ a hundredfold.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device=device)
    scales = torch.logspace(-1, 1, in_features, device=device)[
        torch.randperm(in_features, generator=generator, device=device)
    ]
    x = torch.randn(4 * in_features, in_features, generator=generator, device=device) * scales
    x += torch.randn(4 * in_features, 1, generator=generator, device=device)
    return weight, x.T @ x


def official_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """The upper Cholesky factor of H^-1 (in, in), by a factor, an inverse and another factor."""
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def official_block_selection(block: Tensor, diagonal: Tensor, sparsity: float) -> Tensor:
    """The pruned entries as bool, in the shape of ``block``; the threshold comes from a full sort."""
    scores = block**2 / diagonal**2
    threshold = scores.flatten().sort()[0][int(scores.numel() * sparsity)]
    return scores <= threshold


def official_sweep(
    weight: Tensor, factor: Tensor, sparsity: float | None, keep_n: int | None, m: int | None, block_size: int = BLOCK
) -> Tensor:
    """The swept weight (out, in). Each block has a threshold by a full sort, a loop over its columns and a product that
    updates the columns right of it."""
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


def trailing_products(weight: Tensor, factor: Tensor, block_size: int = BLOCK, panel: int = BLOCK) -> None:
    """The trailing updates of a sweep alone, which are the vendor's products in our sweep and in the official one.

    Columns in the same panel are updated after every block, columns right of the panel once.
    """
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
    """The kept weights as bool (out, in), by a stable sort of every row and a scatter, or by topk of every group."""
    scores = weight.abs() * norms
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    if m is None:
        order = torch.sort(scores, dim=-1, stable=True)[1]
        return ~pruned.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    for column in range(0, scores.shape[1], m):
        group = scores[:, column : column + m].float()
        pruned.scatter_(1, column + group.topk(m - keep_n, dim=1, largest=False)[1], True)
    return ~pruned


def official_cka(features: Tensor) -> Tensor:
    """CKA (layers, layers) of features (layers, samples, features): for every ordered pair both Gram matrices K anew,
    each centred afterwards as H K H."""
    count, samples, _ = features.shape
    wide = torch.promote_types(features.dtype, torch.float32)
    centring = torch.eye(samples, dtype=wide, device=features.device) - 1 / samples

    def centred_gram(matrix: Tensor) -> Tensor:
        matrix = matrix.to(wide)
        return centring @ (matrix @ matrix.T) @ centring

    result = torch.empty(count, count, dtype=wide, device=features.device)
    for i in range(count):
        for j in range(count):
            k, other = centred_gram(features[i]), centred_gram(features[j])
            result[i, j] = (k * other).sum() / (k.norm() * other.norm())
    return result
