"""The masked-LoRA linear, forward and forward + backward, against plain, PEFT, eager LoSA and composed layers.

times_floor: the median over the time of the vendor's three products that a dense step consists of (one product for a
forward pass); a step that leaves zeros out can be faster. losa_speedup: how many times faster than this row ours is.
extra_memory_mb: the peak above the memory before the call. host_ms (on a GPU): the host's time to launch the call.

On a GPU both of our ways, "fused" and "compose", have rows beside the chosen one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks._lora_baselines import (
    Problem,
    compiled,
    compose,
    eager_losa,
    eager_losa_checkpointed,
    losa,
    peft_lora,
    plain,
    step,
    three_products,
)
from benchmarks._problems import DTYPES, ONLY_THESE_SHAPES, SHAPES, shape_name, sizes, wrong_kernel
from benchmarks._results import parser, report
from benchmarks._timing import host_seconds, interleaved, medians, peak_bytes, product_rate, rotation, setting
from losa_kernels import settings
from losa_kernels.masked_lora import reference
from losa_kernels.masked_lora.layer import Layer

# glibc gives large blocks back to the system at once, and faults them in anew at the next call. With raised thresholds
# it keeps them.
RAISED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
# On a CPU the larger ranks and dropout are measured on one small and one large shape. On a GPU the baselines that start
# slowly (PEFT, torch.compile, all forms of eager code but one) are measured on one shape, at the first rank.
SHOWN = {"cpu": {(1536, 576, 2048), (4096, 4096, 512)}, "cuda": {(4096, 4096, 4096)}}
WAYS = settings.MASKED_LORA.values[1:]  # fused, compose


def main(argv: list[str]) -> int:
    arguments = parser("masked_lora", __doc__)
    arguments.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    arguments.add_argument("--shape", type=sizes(3), metavar="OUTxINxT", **ONLY_THESE_SHAPES)
    arguments.add_argument("--rank", action="append", type=int, help="measure only this rank; may be repeated")
    arguments.add_argument("--sparsity", action="append", type=float, help="zeros of the weight; default 0.7")
    arguments.add_argument(
        "--no-slow-baselines", action="store_true", help="without PEFT, torch.compile and eager forms that start slowly"
    )
    arguments.add_argument(
        "--allocator",
        choices=("default", "raised", "both"),
        default="default",
        help="CPU: glibc's thresholds as they are, raised so that large blocks are kept, or one run of each",
    )
    args = arguments.parse_args(argv)
    args.dtype = args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")
    if args.allocator == "both" or (args.allocator == "raised" and not RAISED.items() <= os.environ.items()):
        results = [
            row
            for setting in (("default", "raised") if args.allocator == "both" else ("raised",))
            for row in _in_process(argv, setting)
        ]
    else:
        limit = product_rate(args.device, DTYPES[args.dtype])
        results = (
            row
            for *problem, baselines in _grid(args)
            for sparsity in args.sparsity or [0.7]
            for row in measure(*problem, baselines and not args.no_slow_baselines, sparsity, limit, args)
        )
    report("masked_lora", results, args.json, args.device)
    return 0


def _in_process(argv: list[str], allocator: str) -> list[dict]:
    """The rows that a new process measures, because the allocator reads its settings once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        flags = [*argv, "--allocator", allocator, "--json", str(file)]
        environment = os.environ | (RAISED if allocator == "raised" else {})
        subprocess.run([sys.executable, "-m", "benchmarks", "masked_lora", *flags], check=True, env=environment)
        return json.loads(file.read_text())["rows"]


def _grid(args) -> list[tuple[int, int, int, int, float, bool]]:
    """(out, in, tokens, rank, dropout_p, whether to measure all baselines)"""
    on_gpu = args.device.startswith("cuda")
    ranks = args.rank or ([8] if args.quick else [8, 16] if on_gpu else [8, 16, 64])
    if args.shape:
        shapes = args.shape
    elif on_gpu:
        lengths = (4096,) if args.quick else (4096, 16384)
        shapes = [(*side, t) for side in SHAPES["llama2-7b"][:2] for t in lengths]
    else:
        small = [(1536, 576), (576, 1536)]
        shapes = [(*side, t) for side in small for t in ((2048,) if args.quick else (512, 2048))] + [(4096, 4096, 512)]
        if not args.quick:
            shapes += [(11008, 4096, 512), (5120, 5120, 512)]
    dropouts = (0.0,) if args.quick or (on_gpu and not args.shape) else (0.0, 0.1)
    shown = shapes if args.shape else SHOWN["cuda" if on_gpu else "cpu"]
    return [
        (*shape, rank, p, not on_gpu or (shape in shown and rank == ranks[0]))
        for p in dropouts  # outermost, so that a run that is cut short has all problems without dropout
        for shape in shapes
        for rank in ranks
        if on_gpu or shape in shown or (rank == ranks[0] and p == 0)
    ]


def measure(
    out: int, inner: int, tokens: int, rank: int, p: float, baselines: bool, sparsity: float, limit: float, args
) -> list[dict]:
    dtype = DTYPES[args.dtype]
    size = out * inner * dtype.itemsize
    repetitions = args.repetitions or (5 if args.quick else 9)
    count = rotation(size + tokens * (out + inner) * dtype.itemsize, args.device, repetitions)
    problems = [Problem.random(out, inner, tokens, rank, dtype, args.device, p, sparsity) for _ in range(count)]
    check(problems[0])
    forwards: dict[str, list[Callable]] = {"losa": [losa] * count}
    if args.device.startswith("cuda"):
        for way in WAYS:
            check(problems[0], way)
            forwards[f"losa, {way}"] = [losa] * count
    forwards |= {"plain": [plain] * count, "eager_losa": [eager_losa] * count}
    if baselines:
        forwards |= {
            "eager_losa_checkpointed": [eager_losa_checkpointed] * count,
            "compose_autograd": [compose] * count,
            "compose_compiled": [compiled(compose)] * count,
            "peft": [peft_lora(problem) for problem in problems],
        }
        if forwards["peft"][0] is None:
            del forwards["peft"]
    fields = {
        "shape": shape_name((out, inner)),
        "tokens": tokens,
        "rank": rank,
        "dropout_p": p,
        "sparsity": sparsity,
        "dtype": args.dtype,
        "allocator": "raised" if RAISED.items() <= os.environ.items() else "default",
    }
    found = []
    for direction, products, floor in (("forward", 1, "plain"), ("forward+backward", 3, "three_products")):
        runs: dict[str, list[Callable]] = {}
        for name, each in forwards.items():
            if direction == "forward":
                runs[name] = [torch.no_grad()(lambda f=f, q=q: f(q)) for f, q in zip(each, problems, strict=True)]
            else:
                runs[name] = [step(f, q) for f, q in zip(each, problems, strict=True)]
        if direction != "forward":
            runs["three_products"] = [three_products(problem) for problem in problems]
        flops = 2.0 * tokens * out * inner * products
        found += rows_of(runs, {"op": direction, **fields}, floor, flops / limit, size, repetitions, args.device)
    return found


def rows_of(
    runs: dict[str, list[Callable]],
    fields: dict,
    floor: str,
    fastest: float,
    size: int,
    repetitions: int,
    device: str,
) -> list[dict]:
    """``floor``: the run that others are compared with; ``fastest``: seconds at the limit of FLOPs; ``size``: bytes of
    the weight."""
    rotating = {name: in_turn(name, each) for name, each in runs.items()}
    times = interleaved(rotating, repetitions, device)
    taken = medians(times)
    memory = {name: peak_bytes(lambda run=run: run(0), device) for name, run in rotating.items()}
    return [
        {
            **fields,
            "implementation": name,
            "median_ms": 1e3 * taken[name],
            "min_ms": 1e3 * min(times[name]),
            "host_ms": 1e3 * host_seconds(rotating[name], device) if device.startswith("cuda") else None,
            "times_floor": taken[name] / taken[floor],
            "losa_speedup": taken[name] / taken["losa"],
            "fraction_of_flop_limit": fastest / taken[name],
            "extra_memory_mb": memory[name] / 2**20,
            "extra_memory_over_plain_in_w": (memory[name] - memory["plain"]) / size,
        }
        for name in runs
    ]


def in_turn(name: str, runs: list[Callable]) -> Callable[[int], object]:
    """Runs them one after another; the runs of "losa, WAY" with this way forced."""
    way = name.rpartition(", ")[2]
    if way not in WAYS:
        return lambda i: runs[i % len(runs)]()

    def forced(i: int) -> None:
        with setting("LOSA_MASKED_LORA", way):
            runs[i % len(runs)]()

    return forced


def check(problem: Problem, way: str = "auto") -> None:
    """Compares 64 rows or columns of every result with the fp64 reference. Raises SystemExit: one is wrong."""
    if problem.dropout_p:
        return
    with setting("LOSA_MASKED_LORA", way):
        _check(problem)


def _check(problem: Problem) -> None:
    part, s, mask = slice(0, 64), problem.scaling, problem.mask
    grad, W, x, A, B = (t.detach().double() for t in (problem.grad, problem.weight, *problem.leaves))
    y = losa(problem)
    _compare("y", y[part], reference.forward(x[part], Layer(W, mask, A, B, s), None, 0.0, 0))
    y.backward(problem.grad)
    dx, dA, dB = (leaf.grad for leaf in problem.leaves)
    for leaf in problem.leaves:
        leaf.grad = None

    def backward(which: int, grad: torch.Tensor, x: torch.Tensor, *layer: torch.Tensor) -> torch.Tensor:
        return reference.backward(grad, x, Layer(*layer, s), 0.0, 0, [i == which for i in range(4)])[which]

    _compare("x", dx[part], backward(0, grad[part], x[part], W, mask, A, B))
    columns = (x[:, part], W[:, part], mask[:, :8], A[:, part])
    _compare("lora_A", dA[:, part], backward(1, grad, *columns, B), problem.x.dtype)
    _compare("lora_B", dB[part], backward(2, grad[:, part], x, W[part], mask[part], A, B[part]), problem.x.dtype)


def _compare(name: str, ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """``dtype`` is the type of the products, where the result has another one."""
    error = float((ours.detach().double() - truth).abs().max() / truth.abs().max())
    if not error <= max(8 * torch.finfo(dtype or ours.dtype).eps, 2**-16):
        raise wrong_kernel("masked_lora", f"relative error {error:.2e} of {name}")
