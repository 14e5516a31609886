"""SparseGPT's Hessian: its accumulation over tokens, and its inverse factor, against the official manner.

The official manner: the full product of fp32 inputs, and Cholesky, inverse, Cholesky. On a GPU the two methods of our
factor have rows of their own, and torch_ms is what torch's Cholesky factor and triangular inverse take alone.

fraction_of_limit of the accumulation: half the FLOPs of a product, at the rate of a large product (of fp32, on a GPU of
the inputs' dtype), over the time taken. error, official_error: relative to fp64, in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks._problems import dtype_name, shape_name, wrong_kernel
from benchmarks._pruning_baselines import official_factor, problem
from benchmarks._results import parser, report
from benchmarks._timing import interleaved, medians, product_rate, setting
from losa_kernels.pruning import accumulate_hessian, complete_hessian, inverse_factor

WIDTHS = (576, 1536, 4096)
GPU_WIDTHS = (4096, 11008)
GPU_TOKENS = 2048


def main(argv: list[str]) -> int:
    arguments = parser("hessian", __doc__)
    arguments.add_argument("--width", type=int, action="append", help="in features; only these; may be repeated")
    arguments.add_argument("--tokens", type=int, help=f"of a batch; default: 512, on a GPU {GPU_TOKENS}")
    args = arguments.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    dtypes = (torch.float32, torch.bfloat16)
    rates = {dtype: product_rate(args.device, dtype if on_gpu else torch.float32) for dtype in dtypes}
    widths = GPU_WIDTHS if on_gpu else WIDTHS
    tokens = args.tokens or (GPU_TOKENS if on_gpu else 512)

    def measured() -> Iterator[dict]:
        for width in args.width or (widths[: len(widths) - 1] if args.quick else widths):
            repetitions = args.repetitions or (5 if width > 2048 else 15)
            for dtype in dtypes:
                yield accumulation(tokens, width, dtype, repetitions, rates[dtype], args.device)
            for method in ("auto", "torch", "blocked") if on_gpu else ("auto",):
                yield factor(width, repetitions, args.device, method)
            if on_gpu:
                yield from library_steps(width, repetitions, args.device)

    report("hessian", measured(), args.json, args.device)
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
    # Tensor cores add 16 terms at a time and cut the sum off, where fp32 units round it.
    cut = tokens / 16 if device.startswith("cuda") and dtype != torch.float32 else 1
    check(errors, cut * torch.finfo(torch.float32).eps)
    times = interleaved({"losa": lambda _: accumulate_hessian(ours, x), "official": plain}, repetitions, device)
    row = row_of("accumulate", (tokens, width), dtype, times, errors)
    return row | {"fraction_of_limit": tokens * width * (width + 1) / rate / (row["losa_ms"] / 1e3)}


def factor(width: int, repetitions: int, device: str, method: str = "auto") -> dict:
    hessian = problem(1, width, device)[1]
    truth = official_factor(hessian.double())
    with setting("LOSA_FACTOR", method):
        errors = [relative(inverse_factor(hessian, 0.01)[0], truth), relative(official_factor(hessian), truth)]
        check(errors)
        runs = {"losa": lambda _: inverse_factor(hessian, 0.01), "official": lambda _: official_factor(hessian)}
        times = interleaved(runs, repetitions, device)
    op = "inverse factor" if method == "auto" else f"inverse factor, {method}"
    return row_of(op, (width, width), hessian.dtype, times, errors)


def library_steps(width: int, repetitions: int, device: str) -> list[dict]:
    """The time of the vendor's library for the two cubic steps of a factor."""
    hessian = problem(1, width, device)[1]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper, identity = torch.linalg.cholesky(hessian, upper=True), torch.eye(width, device=device)
    runs = {
        "cholesky": lambda _: torch.linalg.cholesky_ex(hessian, upper=True),
        "triangular inverse": lambda _: torch.linalg.solve_triangular(upper, identity, upper=True),
    }
    times = interleaved(runs, repetitions, device)
    return [
        {"op": op, "shape": shape_name((width, width)), "torch_ms": 1e3 * taken} for op, taken in medians(times).items()
    ]


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def check(errors: list[float], more: float = torch.finfo(torch.float32).eps) -> None:
    ours, official = errors
    if not ours <= 2 * official + more:
        raise wrong_kernel("hessian", f"error {ours:.2e}, official {official:.2e}")


def row_of(
    op: str, shape: tuple[int, int], dtype: torch.dtype, times: dict[str, list[float]], errors: list[float]
) -> dict:
    taken = medians(times)
    ours, official = taken["losa"], taken["official"]
    return {
        "op": op,
        "shape": shape_name(shape),
        "dtype": dtype_name(dtype),
        "losa_ms": 1e3 * ours,
        "official_ms": 1e3 * official,
        "speedup": official / ours,
        "error": errors[0],
        "official_error": errors[1],
    }
