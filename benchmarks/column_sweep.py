"""SparseGPT given H and Wanda's masks, stage by stage, against the official manner (``_pruning_baselines``).

``agreement``: share of mask entries as in the fp64 reference, ``loss_error``: how far the loss is from the reference's;
on a GPU for every shape, on a CPU for small ones. Stages of ours and of the official loop: the factor, the whole sweep
given the factor, both together, and what trailing products alone leave for selection and columns. Ours have ``host_ms``
too: from call to return while the device has nothing else to do. Parts of our sweep alone: ``selection``, ``columns``,
``trailing``. ``official_runs``: how often the official loop was timed, on a GPU once. ``sweep block``: the operator
alone on the first 128 columns, and the time to move its bytes at copy speed over the time taken.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks._pruning_baselines import (
    PATTERNS,
    SHAPES,
    official_factor,
    official_sweep,
    problem,
    trailing_products,
)
from benchmarks._timing import copy_bandwidth, host_seconds, interleaved, parser, report, seconds
from benchmarks.selection import BLOCK, wanda
from losa_kernels import dispatch, native, sparsegpt_prune, unpack_mask
from losa_kernels.bitmask import packed_width
from losa_kernels.pruning import cuda, inverse_factor
from losa_kernels.pruning.blocks import STATE, block_counts

AGREEMENT, LOSS_ERROR = 0.998, 5e-3  # the least and the most that pass as right


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
            if native.missing(args.device.partition(":")[0]) is None:
                results.append(block(weight, hessian, name, pattern, repetitions, limit, args.device))
            results += wanda(weight, hessian, name, pattern, 2 * repetitions, limit, args.device)
    report("column_sweep", results, args.json, args.device)
    return 0


def sparsegpt(weight, hessian, name, pattern, repetitions, args) -> list[dict]:
    sparsity, keep_n, m = pattern
    settings = {"sparsity": sparsity, "keep_n": keep_n, "m": m}
    found = sparsegpt_prune(weight, hessian, **settings)
    kept = unpack_mask(found.mask, weight.shape[1])
    on_gpu = args.device.startswith("cuda")
    agreement = loss_error = None
    if on_gpu or weight.numel() <= 1 << 20:
        truth = sparsegpt_prune(weight.double(), hessian.double(), **settings)
        agreement = float((kept == unpack_mask(truth.mask, weight.shape[1])).float().mean())
        loss_error = abs(float(found.loss.double().sum() / truth.loss.sum()) - 1)
        if not (agreement > AGREEMENT and loss_error < LOSS_ERROR):
            raise SystemExit(
                f"column_sweep: agreement {agreement:.5f} with fp64, loss off by {loss_error:.1e}; "
                "not timing a wrong kernel"
            )
        del truth
    factor, official = inverse_factor(hessian, 0.01)[0], official_factor(hessian)
    sweep = dispatch.implementation("column_sweep", weight.device)
    panel = cuda.PANEL if on_gpu else BLOCK
    runs = {
        "losa, whole": lambda _: sparsegpt_prune(weight, hessian, **settings),
        "losa, factor": lambda _: inverse_factor(hessian, 0.01),
        "official, factor": lambda _: official_factor(hessian),
        "losa, sweep": lambda _: sweep(weight.clone(), factor, *pattern, BLOCK, None),
        "losa, trailing": lambda _: trailing_products(weight, factor, BLOCK, panel),
        "official, trailing": lambda _: trailing_products(weight, factor, BLOCK, BLOCK),
    }

    def loop(_):
        official_sweep(weight, official, *pattern)

    if not on_gpu:
        runs["official, sweep"] = loop
    times = interleaved(runs, repetitions, args.device)
    if on_gpu:
        times["official, sweep"] = [seconds(loop, 0, args.device)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["official, whole"] = medians["official, factor"] + medians["official, sweep"]
    for side in ("losa", "official"):
        rest = medians[f"{side}, sweep"] - medians[f"{side}, trailing"]
        medians[f"{side}, selection and columns"] = max(rest, 1e-9)
    host = {
        stage: host_seconds(runs[f"losa, {stage}"], args.device, repetitions) for stage in ("whole", "factor", "sweep")
    }
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
                "trailing_ms": 1e3 * medians["losa, trailing"],
                "agreement": agreement,
                "loss_error": loss_error,
                "host_ms": 1e3 * host[stage] if stage in host else None,
                "official_runs": len(times["official, sweep"]),
            }
        )
    if native.missing(args.device.partition(":")[0]) is None:
        rows += parts(weight, factor, name, pattern, repetitions, args.device)
    return rows


def parts(weight, factor, name, pattern, repetitions, device) -> list[dict]:
    """All column blocks' selections, and all their columns, one after the other without what is between them."""
    (rows, columns), (sparsity, keep_n, m) = weight.shape, pattern
    work, loss = weight.clone(), weight.new_zeros(rows)
    kept = torch.zeros(rows, packed_width(columns), dtype=torch.uint8, device=device)
    scratch, state = weight.new_empty(rows * BLOCK), None
    spans = [(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]
    if not m:
        state = torch.zeros(STATE, dtype=torch.int32, device=device)
        counts = block_counts(sparsity, weight, BLOCK, None)

    def select(_):
        for index, (start, end) in enumerate(spans):
            torch.ops.losa.select_block(work, factor, start, end, counts, index, None, scratch, state)

    def sweep(_):
        for start, end in spans:
            errors = scratch[: rows * (end - start)].view(rows, end - start)
            torch.ops.losa.sweep_block(
                work, factor, start, end, m or 0, m - keep_n if m else 0, state, None, kept, errors, loss
            )

    if not m:
        select(0)
    runs = ({} if m else {"selection": select}) | {"columns": sweep}
    times = interleaved(runs, repetitions, device)
    shape = "x".join(map(str, weight.shape))
    return [
        {"op": f"sparsegpt, part: {part}", "shape": shape, "pattern": name, "losa_ms": 1e3 * statistics.median(taken)}
        for part, taken in times.items()
    ]


def block(weight, hessian, name, pattern, repetitions, limit, device) -> dict:
    """Swept again and again in place: what has gone is chosen anew and stays zero, at the same cost."""
    (rows, columns), (_, keep_n, m) = weight.shape, pattern
    width = min(BLOCK, columns)
    work, factor = weight.clone(), inverse_factor(hessian, 0.01)[0]
    kept = torch.zeros(rows, packed_width(columns), dtype=torch.uint8, device=device)
    errors, loss = work.new_empty(rows, width), work.new_zeros(rows)
    state, group = None, (m, m - keep_n) if m else (0, 0)
    if not m:
        state = torch.zeros(STATE, dtype=torch.int32, device=device)
        counts = torch.tensor([rows * width // 2], device=device)
        torch.ops.losa.select_block(work, factor, 0, width, counts, 0, None, errors, state)

    def run(_):
        torch.ops.losa.sweep_block(work, factor, 0, width, *group, state, None, kept, errors, loss)

    seconds_taken = statistics.median(interleaved({"losa": run}, repetitions, device)["losa"])
    return {
        "op": "sweep block",
        "shape": f"{rows}x{width}",
        "pattern": name,
        "losa_ms": 1e3 * seconds_taken,
        "fraction_of_copy_bandwidth": (2 * 4 * rows * width + errors.nbytes) / limit / seconds_taken,
    }
