"""SparseGPT given H and Wanda's masks, stage by stage, against the official manner (``_pruning_baselines``).

``agreement``: share of mask entries as in the fp64 reference. Stages of ours and of the official loop: the factor, the
whole sweep given the factor, the trailing products alone, and what is left for selection and columns.
"""

from __future__ import annotations

import statistics

from benchmarks._pruning_baselines import (
    PATTERNS,
    SHAPES,
    official_factor,
    official_sweep,
    problem,
    trailing_products,
)
from benchmarks._timing import copy_bandwidth, interleaved, parser, report
from benchmarks.selection import wanda
from losa_kernels import dispatch, sparsegpt_prune, unpack_mask
from losa_kernels.column_sweep import inverse_factor


def main(argv: list[str]) -> int:
    arguments = parser("column_sweep", __doc__)
    arguments.add_argument("--shape", action="append", metavar="OUTxIN", help="only these; may be repeated")
    arguments.add_argument("--repetitions", type=int)
    args = arguments.parse_args(argv)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or []] or (SHAPES[:2] if args.quick else SHAPES)
    limit = copy_bandwidth(args.device)
    results = []
    for out_features, in_features in shapes:
        weight, hessian = problem(out_features, in_features, args.device)
        for name, pattern in PATTERNS.items():
            repetitions = args.repetitions or (3 if max(out_features, in_features) > 2048 else 7)
            results += sparsegpt(weight, hessian, name, pattern, repetitions, args)
            results += wanda(weight, hessian, name, pattern, 2 * repetitions, limit, args.device)
    report("column_sweep", results, args.json, args.device)
    return 0


def sparsegpt(weight, hessian, name, pattern, repetitions, args) -> list[dict]:
    sparsity, keep_n, m = pattern
    settings = {"sparsity": sparsity, "keep_n": keep_n, "m": m}
    found = sparsegpt_prune(weight, hessian, **settings)
    kept = unpack_mask(found.mask, weight.shape[1])
    agreement = None
    if weight.numel() <= 1 << 20:
        truth = sparsegpt_prune(weight.double(), hessian.double(), **settings)
        agreement = float((kept == unpack_mask(truth.mask, weight.shape[1])).float().mean())
        if not agreement > 0.999:
            raise SystemExit(f"column_sweep: agreement {agreement:.5f} with fp64; not timing a wrong kernel")
    factor, official = inverse_factor(hessian, 0.01)[0], official_factor(hessian)
    sweep = dispatch.implementation("column_sweep", weight.device)
    runs = {
        "losa, whole": lambda _: sparsegpt_prune(weight, hessian, **settings),
        "official, whole": lambda _: official_sweep(weight, official_factor(hessian), *pattern),
        "losa, factor": lambda _: inverse_factor(hessian, 0.01),
        "official, factor": lambda _: official_factor(hessian),
        "losa, sweep": lambda _: sweep(weight.clone(), factor, *pattern, 128, None),
        "official, sweep": lambda _: official_sweep(weight, official, *pattern),
        "trailing": lambda _: trailing_products(weight, factor),
    }
    medians = {k: statistics.median(v) for k, v in interleaved(runs, repetitions, args.device).items()}
    for side in ("losa", "official"):
        medians[f"{side}, selection and columns"] = max(medians[f"{side}, sweep"] - medians["trailing"], 1e-9)
    rows = []
    for stage in ("whole", "factor", "sweep", "selection and columns"):
        ours, theirs = medians[f"losa, {stage}"], medians[f"official, {stage}"]
        rows.append(
            {
                "op": f"sparsegpt, {stage}",
                "shape": "x".join(map(str, weight.shape)),
                "pattern": name,
                "losa_ms": 1e3 * ours,
                "official_ms": 1e3 * theirs,
                "speedup": theirs / ours,
                "trailing_ms": 1e3 * medians["trailing"],
                "agreement": agreement,
            }
        )
    return rows
