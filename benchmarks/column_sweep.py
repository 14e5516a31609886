"""SparseGPT given its Hessian, and Wanda's masks, stage by stage, against the official manner (_pruning_baselines).

Stages of ours and of the official loop: the factor, the whole sweep given the factor, both together, and what the sweep
takes without its trailing products, for selection and columns. Parts of our sweep alone: selection, columns, trailing.

agreement: the share of mask entries as in the fp64 reference. loss_error: how far the loss is from the loss of the
reference. Both are measured for every shape on a GPU, and for small shapes on a CPU.

host_ms: from call to return while the device has nothing else to do. official_runs: how often the official loop was
timed, on a GPU once.

sweep block: the operator alone on the first 128 columns; fraction_of_copy_bandwidth is the time to move its bytes at
the speed of a copy, over the time taken.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks._machine import has_kernels
from benchmarks._problems import shape_name, wrong_kernel
from benchmarks._pruning_baselines import (
    BLOCK,
    PATTERNS,
    add_shape_option,
    official_factor,
    official_sweep,
    problem,
    shapes_of,
    trailing_products,
)
from benchmarks._results import parser, report
from benchmarks._timing import host_seconds, interleaved, medians, seconds
from benchmarks.selection import wanda
from losa_kernels import dispatch, sparsegpt_prune, unpack_mask
from losa_kernels.bitmask import packed_width
from losa_kernels.pruning import cuda, inverse_factor
from losa_kernels.pruning.blocks import STATE, block_counts
from losa_kernels.timing import copy_bandwidth

AGREEMENT, LOSS_ERROR = 0.998, 5e-3  # the smallest agreement and the largest error that pass as right
STAGES = ("whole", "factor", "sweep", "selection and columns")


def main(argv: list[str]) -> int:
    arguments = parser("column_sweep", __doc__)
    add_shape_option(arguments)
    args = arguments.parse_args(argv)
    limit = copy_bandwidth(args.device)
    results = []
    for shape in shapes_of(args):
        weight, hessian = problem(*shape, args.device)
        for name, pattern in PATTERNS.items():
            repetitions = args.repetitions or (3 if max(shape) > 2048 else 7)
            results += sparsegpt(weight, hessian, name, pattern, repetitions, args)
            if has_kernels(args.device):
                results.append(block(weight, hessian, name, pattern, repetitions, limit, args.device))
            results += wanda(weight, hessian, name, pattern, 2 * repetitions, limit, args.device)
    report("column_sweep", results, args.json, args.device)
    return 0


def sparsegpt(weight, hessian, name, pattern, repetitions, args) -> list[dict]:
    agreement, loss_error = exactness(weight, hessian, pattern, args.device)
    factor = inverse_factor(hessian, 0.01)[0]
    taken, host, official_runs = stage_seconds(weight, hessian, factor, pattern, repetitions, args.device)
    rows = []
    for stage in STAGES:
        ours, theirs = taken[f"losa, {stage}"], taken[f"official, {stage}"]
        rows.append(
            {
                "op": f"sparsegpt, {stage}",
                "shape": shape_name(weight.shape),
                "pattern": name,
                "losa_ms": 1e3 * ours,
                "official_ms": 1e3 * theirs,
                "speedup": theirs / ours,
                "trailing_ms": 1e3 * taken["losa, trailing"],
                "agreement": agreement,
                "loss_error": loss_error,
                "host_ms": 1e3 * host[stage] if stage in host else None,
                "official_runs": official_runs,
            }
        )
    if has_kernels(args.device):
        rows += parts(weight, factor, name, pattern, repetitions, args.device)
    return rows


def exactness(weight, hessian, pattern, device) -> tuple[float | None, float | None]:
    """Agreement and loss error, see above; None for a large shape on a CPU. Raises SystemExit: ours is wrong."""
    if not (device.startswith("cuda") or weight.numel() <= 1 << 20):
        return None, None
    settings = dict(zip(("sparsity", "keep_n", "m"), pattern, strict=True))
    found = sparsegpt_prune(weight, hessian, **settings)
    truth = sparsegpt_prune(weight.double(), hessian.double(), **settings)
    kept, expected = (unpack_mask(result.mask, weight.shape[1]) for result in (found, truth))
    agreement = float((kept == expected).float().mean())
    loss_error = abs(float(found.loss.double().sum() / truth.loss.sum()) - 1)
    if not (agreement > AGREEMENT and loss_error < LOSS_ERROR):
        raise wrong_kernel("column_sweep", f"agreement {agreement:.5f} with fp64, loss off by {loss_error:.1e}")
    return agreement, loss_error


def stage_seconds(
    weight, hessian, factor, pattern, repetitions, device
) -> tuple[dict[str, float], dict[str, float], int]:
    """(Seconds by "SIDE, STAGE", host's seconds of ours by stage, how often the official sweep was timed)."""
    settings = dict(zip(("sparsity", "keep_n", "m"), pattern, strict=True))
    on_gpu = device.startswith("cuda")
    official = official_factor(hessian)
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
    times = interleaved(runs, repetitions, device)
    if on_gpu:
        times["official, sweep"] = [seconds(loop, 0, device)]

    # Stages that are sums or differences of what was timed.
    taken = medians(times)
    taken["official, whole"] = taken["official, factor"] + taken["official, sweep"]
    for side in ("losa", "official"):
        rest = taken[f"{side}, sweep"] - taken[f"{side}, trailing"]
        taken[f"{side}, selection and columns"] = max(rest, 1e-9)
    host = {stage: host_seconds(runs[f"losa, {stage}"], device, repetitions) for stage in ("whole", "factor", "sweep")}
    return taken, host, len(times["official, sweep"])


def parts(weight, factor, name, pattern, repetitions, device) -> list[dict]:
    """The selections of all column blocks one after another, and the sweeps over their columns, without the updates
    between them."""
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
    shape = shape_name(weight.shape)
    return [
        {"op": f"sparsegpt, part: {part}", "shape": shape, "pattern": name, "losa_ms": 1e3 * statistics.median(taken)}
        for part, taken in times.items()
    ]


def block(weight, hessian, name, pattern, repetitions, limit, device) -> dict:
    """The first block, swept again and again in place: the same entries are chosen and stay zero, at the same cost."""
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
        "shape": shape_name((rows, width)),
        "pattern": name,
        "losa_ms": 1e3 * seconds_taken,
        "fraction_of_copy_bandwidth": (2 * 4 * rows * width + errors.nbytes) / limit / seconds_taken,
    }
