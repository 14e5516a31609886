"""Exact selection: a column block of SparseGPT's sweep and Wanda's rows, against full sorts and torch.kthvalue.

``official_ms``: the sort of a whole block, or sort and scatter of every row. ``kthvalue_ms``: the k-th value and a
comparison, which is not exact where scores tie. ``kernel_ms``: the operator alone, without checks of its arguments, of
which the fraction of copy speed is. Wanda's runs go through several weights, more than the cache holds; a column block
is in the cache in a sweep too, whose update has just written it.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks._pruning_baselines import PATTERNS, SHAPES, official_block_selection, official_wanda, problem
from benchmarks._timing import copy_bandwidth, interleaved, parser, report, rotation
from losa_kernels import native, unpack_mask, wanda_mask
from losa_kernels.pruning import checks_together, inverse_factor, reference
from losa_kernels.pruning.blocks import STATE

BLOCK = 128


def main(argv: list[str]) -> int:
    arguments = parser("selection", __doc__)
    arguments.add_argument("--shape", action="append", metavar="OUTxIN", help="only these; may be repeated")
    arguments.add_argument("--repetitions", type=int)
    args = arguments.parse_args(argv)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or []] or (SHAPES[:2] if args.quick else SHAPES)
    limit = copy_bandwidth(args.device)

    def measured():
        for shape in shapes:
            weight, hessian = problem(*shape, args.device)
            repetitions = args.repetitions or (5 if max(shape) > 2048 else 15)
            if native.missing(args.device.partition(":")[0]) is None:
                yield from block(weight, inverse_factor(hessian, 0.01)[0], 0.5, repetitions, limit, args.device)
            for name, pattern in PATTERNS.items():
                yield from wanda(weight, hessian, name, pattern, repetitions, limit, args.device)

    report("selection", measured(), args.json, args.device)
    return 0


def block(weight, factor, sparsity, repetitions, limit, device) -> list[dict]:
    """The bound of the first column block."""
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
        raise SystemExit(
            "selection: the bound does not part the smallest scores from the rest; not timing a wrong kernel"
        )
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
        raise SystemExit("selection: Wanda's mask differs from the reference; not timing a wrong kernel")

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
    if native.missing(device.partition(":")[0]) is None:
        pruned = reference.prune_count(sparsity, weight.shape[1]) if m is None else m - keep_n
        runs["kernel"] = lambda i: torch.ops.losa.wanda_select(weights[i % count], norms, pruned, m or 0, None)
    times = interleaved(runs, repetitions, device)
    if device.startswith("cuda"):
        # Many masks in a row, their values' checks read once.
        with checks_together():
            times |= interleaved({"queued": runs["losa"]}, repetitions, device)
    return [row_of("wanda mask", weight.shape, name, times, (weight.nbytes + weight.numel() / 8) / limit)]


def row_of(op: str, shape, pattern: str, times: dict[str, list[float]], fastest: float) -> dict:
    """``fastest``: seconds to move the bytes at copy speed."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "op": op,
        "shape": "x".join(map(str, shape)),
        "pattern": pattern,
        **{f"{name}_ms": 1e3 * value for name, value in medians.items()},
        "speedup": medians["official"] / medians["losa"],
        "fraction_of_copy_bandwidth": fastest / medians.get("kernel", medians["losa"]),
    }
