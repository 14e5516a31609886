"""SparseGPT's Hessian: its accumulation over tokens, and the inverse factor, against the official manner.

Official: the full product of fp32 inputs, and Cholesky, inverse, Cholesky. ``fraction_of_limit`` of the accumulation:
half a product's FLOPs at the rate of a large fp32 product. ``error``, ``official_error``: relative to fp64, Frobenius.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks._pruning_baselines import official_factor, problem
from benchmarks._timing import interleaved, parser, product_rate, report
from losa_kernels.column_sweep import accumulate_hessian, complete_hessian, inverse_factor

WIDTHS = (576, 1536, 4096)


def main(argv: list[str]) -> int:
    arguments = parser("hessian", __doc__)
    arguments.add_argument("--width", type=int, action="append", help="in features; only these; may be repeated")
    arguments.add_argument("--tokens", type=int, default=512, help="in a batch")
    arguments.add_argument("--repetitions", type=int)
    args = arguments.parse_args(argv)
    rate = product_rate(args.device, torch.float32)
    results = []
    for width in args.width or (WIDTHS[:2] if args.quick else WIDTHS):
        repetitions = args.repetitions or (5 if width > 2048 else 15)
        for dtype in (torch.float32, torch.bfloat16):
            results.append(accumulation(args.tokens, width, dtype, repetitions, rate, args.device))
        results.append(factor(width, repetitions, args.device))
    report("hessian", results, args.json, args.device)
    return 0


def accumulation(tokens: int, width: int, dtype: torch.dtype, repetitions: int, rate: float, device: str) -> dict:
    x = torch.randn(tokens, width, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    ours, official = (torch.zeros(width, width, device=device) for _ in range(2))

    def plain(_):
        wide = x.float()
        official.add_(wide.T @ wide)

    truth = x.double().T @ x.double()
    accumulate_hessian(ours, x)
    plain(0)
    errors = [relative(complete_hessian(ours.clone()), truth), relative(official, truth)]
    check(errors)
    times = interleaved({"losa": lambda _: accumulate_hessian(ours, x), "official": plain}, repetitions, device)
    row = row_of("accumulate", f"{tokens}x{width}", dtype, times, errors)
    return row | {"fraction_of_limit": tokens * width * (width + 1) / rate / (row["losa_ms"] / 1e3)}


def factor(width: int, repetitions: int, device: str) -> dict:
    hessian = problem(1, width, device)[1]
    truth = official_factor(hessian.double())
    errors = [relative(inverse_factor(hessian, 0.01)[0], truth), relative(official_factor(hessian), truth)]
    check(errors)
    runs = {"losa": lambda _: inverse_factor(hessian, 0.01), "official": lambda _: official_factor(hessian)}
    return row_of("inverse factor", f"{width}x{width}", hessian.dtype, interleaved(runs, repetitions, device), errors)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def check(errors: list[float]) -> None:
    ours, official = errors
    if not ours <= 2 * official + torch.finfo(torch.float32).eps:
        raise SystemExit(f"hessian: error {ours:.2e}, official {official:.2e}; not timing a wrong kernel")


def row_of(op: str, shape: str, dtype: torch.dtype, times: dict[str, list[float]], errors: list[float]) -> dict:
    ours, official = (statistics.median(times[name]) for name in ("losa", "official"))
    return {
        "op": op,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "losa_ms": 1e3 * ours,
        "official_ms": 1e3 * official,
        "speedup": official / ours,
        "error": errors[0],
        "official_error": errors[1],
    }
