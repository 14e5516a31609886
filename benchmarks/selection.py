"""Exact selection of the weights to prune, in a column block of SparseGPT's sweep and in Wanda's rows, against full
sorts and torch.kthvalue.

official_ms: the sort of a whole block, or a sort and a scatter of every row. kthvalue_ms: the k-th value and a
comparison, which is not exact where scores are equal. kernel_ms: the operator alone, without the checks of its
arguments; fraction_of_copy_bandwidth is about it.

Wanda's runs go through several weights, more than the cache holds. A column block is in the cache in a sweep too,
because the update before it has just written it.
"""

from __future__ import annotations

import torch

from benchmarks._machine import has_kernels
from benchmarks._problems import shape_name, wrong_kernel
from benchmarks._pruning_baselines import (
    BLOCK,
    PATTERNS,
    add_shape_option,
    official_block_selection,
    official_wanda,
    problem,
    shapes_of,
)
from benchmarks._results import parser, report
from benchmarks._timing import interleaved, medians, rotation
from losa_kernels import unpack_mask, wanda_mask
from losa_kernels.pruning import checks_together, inverse_factor, reference
from losa_kernels.pruning.blocks import STATE
from losa_kernels.timing import copy_bandwidth


def main(argv: list[str]) -> int:
    arguments = parser("selection", __doc__)
    add_shape_option(arguments)
    args = arguments.parse_args(argv)
    limit = copy_bandwidth(args.device)

    def measured():
        for shape in shapes_of(args):
            weight, hessian = problem(*shape, args.device)
            repetitions = args.repetitions or (5 if max(shape) > 2048 else 15)
            if has_kernels(args.device):
                yield from block(weight, inverse_factor(hessian, 0.01)[0], 0.5, repetitions, limit, args.device)
            for name, pattern in PATTERNS.items():
                yield from wanda(weight, hessian, name, pattern, repetitions, limit, args.device)

    report("selection", measured(), args.json, args.device)
    return 0


def block(weight, factor, sparsity, repetitions, limit, device) -> list[dict]:
    """The bound below which the scores of the first column block are pruned."""
    rows, columns = weight.shape[0], min(BLOCK, weight.shape[1])
    count = reference.prune_count(sparsity, rows * columns)
    counts = torch.tensor([count], device=device)
    scratch = weight.new_empty(rows * columns).view(rows, columns)
    state = torch.zeros(STATE, dtype=torch.int32, device=device)
    diagonal = factor.diagonal()[:columns]

    def ours(_):
        torch.ops.losa.select_block(weight, factor, 0, columns, counts, 0, None, scratch, state)

    def kthvalue(_):
        scores = (weight[:, :columns] / diagonal).square_()
        return scores <= scores.flatten().kthvalue(count).values

    ours(0)
    bound = state[:1].view(torch.float32)
    scores = (weight[:, :columns] / diagonal).square_()
    if not int((scores < bound).sum()) <= count <= int((scores <= bound).sum()):
        raise wrong_kernel("selection", "the bound does not part the smallest scores from the rest")
    runs = {
        "losa": ours,
        "official": lambda _: official_block_selection(weight[:, :columns], diagonal, sparsity),
        "kthvalue": kthvalue,
    }
    times = interleaved(runs, repetitions, device)
    return [row_of("column block", (rows, columns), f"{100 * sparsity:g} %", times, 4 * rows * columns / limit)]


def wanda(weight, hessian, name, pattern, repetitions, limit, device) -> list[dict]:
    sparsity, keep_n, m = pattern
    norms = hessian.diagonal().sqrt()
    settings = {"sparsity": sparsity, "keep_n": keep_n, "m": m}
    truth = unpack_mask(reference.wanda_mask(weight, norms, *pattern, None), weight.shape[1])
    if not torch.equal(unpack_mask(wanda_mask(weight, norms, **settings), weight.shape[1]), truth):
        raise wrong_kernel("selection", "Wanda's mask differs from the reference")

    count = rotation(weight.nbytes, device, repetitions)
    weights = [weight, *(weight.clone() for _ in range(count - 1))]

    def kthvalue(i):
        scores = weights[i % count].abs() * norms
        return scores > scores.kthvalue(reference.prune_count(sparsity, weight.shape[1]), dim=1, keepdim=True).values

    runs = {
        "losa": lambda i: wanda_mask(weights[i % count], norms, **settings),
        "official": lambda i: official_wanda(weights[i % count], norms, *pattern),
    }
    if m is None:
        runs["kthvalue"] = kthvalue
    if has_kernels(device):
        pruned = reference.prune_count(sparsity, weight.shape[1]) if m is None else m - keep_n
        runs["kernel"] = lambda i: torch.ops.losa.wanda_select(weights[i % count], norms, pruned, m or 0, None)
    times = interleaved(runs, repetitions, device)
    if device.startswith("cuda"):
        # Many masks in a row: the checks of all their values are read once.
        with checks_together():
            times |= interleaved({"queued": runs["losa"]}, repetitions, device)
    return [row_of("wanda mask", weight.shape, name, times, (weight.nbytes + weight.numel() / 8) / limit)]


def row_of(op: str, shape, pattern: str, times: dict[str, list[float]], fastest: float) -> dict:
    """``times``: seconds by candidate; ``fastest``: seconds to move the bytes at the speed of a copy."""
    taken = medians(times)
    return {
        "op": op,
        "shape": shape_name(shape),
        "pattern": pattern,
        **{f"{name}_ms": 1e3 * value for name, value in taken.items()},
        "speedup": taken["official"] / taken["losa"],
        "fraction_of_copy_bandwidth": fastest / taken.get("kernel", taken["losa"]),
    }
