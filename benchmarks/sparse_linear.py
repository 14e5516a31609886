"""Decoding with packed weights: y = x W^T for few rows of x, against dense fp32 and bf16, MKL's CSR and scipy's CSR. On
a CPU also dense weights by ``dense_linear`` ("losa, dense bf16").

On a GPU each of our ways ("window", "tiles", "unpack") has rows beside the chosen one. A way that fails, or whose
result is wrong, has a row with "failed" and no time.
"""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks._problems import shape_name, wrong_kernel
from benchmarks._results import parser, rows
from benchmarks._sparse import add_options, copies, kept_mask, pack, run_slices
from benchmarks._timing import interleaved, setting
from losa_kernels import dense_linear, pack_bitmask, pack_mask, settings, sparse_linear
from losa_kernels.timing import copy_bandwidth

BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 4, 8, 16)}
BASELINES = ("dense fp32", "dense bf16", "MKL CSR")
WAYS = settings.SPARSE_LINEAR.values[1:]  # window, tiles, unpack


def main(argv: list[str]) -> int:
    options = parser("sparse_linear", __doc__)
    add_options(options)
    options.add_argument("--batches", metavar="N,...", help="rows of x, instead of 1,4,16 (on a GPU 8 too)")
    options.add_argument("--only", metavar="NAME;...", help="of the implementations; dense bf16 is always measured")
    args = options.parse_args(argv)
    default = BATCHES["cuda" if args.device.startswith("cuda") else "cpu"]
    default = default[:2] if args.quick else default
    batches = [int(n) for n in args.batches.split(",")] if args.batches else default
    megabytes = 64 if args.quick else 256
    limits = {"copy": copy_bandwidth(args.device, megabytes), "read": read_bandwidth(args.device, megabytes)}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR.*")
        run_slices("sparse_linear", args, lambda shape, pattern: measure(shape, pattern, batches, limits, args))
    return 0


def read_bandwidth(device: str, megabytes: int) -> float:
    """Bytes per second of a sum over a large tensor, the limit of a product with one row of x."""
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    return source.nbytes / statistics.median(interleaved({"read": lambda _: source.sum()}, 7, device)["read"])


def measure(shape: tuple[int, int], pattern: str, batches, limits: dict[str, float], args) -> list[dict]:
    small = shape[0] * shape[1] < 1 << 21
    repetitions = args.repetitions or (5 if args.quick else 60 if small else 9)
    kept = kept_mask(shape, pattern, args.device)
    weight = torch.randn(shape, device=args.device).bfloat16().masked_fill_(~kept, 0)
    weights = stored_weights(weight, kept, pattern, repetitions)
    if args.only:
        weights = {name: held for name, held in weights.items() if name in ("dense bf16", *args.only.split(";"))}
    found = []
    for batch in batches:
        x = torch.randn(batch, shape[1], device=args.device)
        runs = {name: runner(name, held, x) for name, held in weights.items()}
        described = {"op": "sparse_linear", "shape": shape_name(shape), "pattern": pattern, "batch": batch}
        for name, reason in failures(runs, x, weight).items():
            del runs[name]
            found.append({**described, "implementation": name, "failed": reason})
        for name, run in runs.items():
            for i in range(len(weights[name])):
                run(i)  # the first call makes what a weight keeps, for instance its tiles
        times = interleaved(runs, repetitions, args.device)
        part = rows(times, "dense fp32" if "dense fp32" in runs else "dense bf16", **described)
        medians = {row["implementation"]: row["median_ms"] for row in part}
        for row in part:
            held = weights[row["implementation"]][0]
            for name in BASELINES:
                if name in medians:
                    row[f"speedup_over_{name}"] = medians[name] / row["median_ms"]
            moved = stored_bytes(held) + 4 * batch * sum(shape)
            for name, limit in limits.items():
                row[f"fraction_of_{name}_bandwidth"] = moved / (row["median_ms"] / 1e3) / limit
        found += part
    return found


def stored_weights(weight: Tensor, kept: Tensor, pattern: str, repetitions: int) -> dict[str, list]:
    """Every way to hold the same weight, each with copies that a run rotates through."""
    wide = weight.float()
    stored = {
        "dense fp32": wide,
        "dense bf16": weight,
        "losa fp32": pack(wide, kept, pattern),
        "losa bf16": pack(weight, kept, pattern),
        "losa bf16, x fp32": pack(weight, kept, pattern),
    }
    if not pattern.endswith("%"):
        stored["losa bf16, as bitmask"] = pack_bitmask(weight, pack_mask(kept))
    weights = {name: copies(thing, repetitions) for name, thing in stored.items()}
    if weight.device.type == "cuda":
        weights |= {f"losa bf16, {way}": copies(stored["losa bf16"], repetitions) for way in WAYS}
    if weight.device.type == "cpu":
        weights["losa, dense bf16"] = copies(weight, repetitions)
        csr = wide.to_sparse_csr()
        values = copies(csr.values(), repetitions)
        triples = [(csr.crow_indices().int(), csr.col_indices().int(), part) for part in values]
        weights["MKL CSR"] = [
            torch.sparse_csr_tensor(*parts, weight.shape, check_invariants=False) for parts in triples
        ]
        if importlib.util.find_spec("scipy"):
            from scipy.sparse import csr_matrix

            weights["scipy CSR"] = [
                csr_matrix((part.numpy(), columns.numpy(), starts.numpy()), weight.shape)
                for starts, columns, part in triples
            ]
    return weights


def stored_bytes(held) -> int:
    if isinstance(held, Tensor) and held.layout == torch.sparse_csr:
        return held.crow_indices().nbytes + held.col_indices().nbytes + held.values().nbytes
    if hasattr(held, "indptr"):
        return held.indptr.nbytes + held.indices.nbytes + held.data.nbytes
    return held.nbytes


def runner(name: str, held: list, x: Tensor) -> Callable[[int], object]:
    count = len(held)
    if name == "scipy CSR":
        columns = x.numpy().T.copy()
        return lambda i: held[i % count] @ columns
    if name == "MKL CSR":
        # torch's matrix product of one row is more than twice as slow as its matrix-vector product.
        if x.shape[0] == 1:
            return lambda i: torch.mv(held[i % count], x[0])
        columns = x.T.contiguous()
        return lambda i: held[i % count] @ columns
    rows = x.bfloat16() if is_narrow(name) else x
    if name.startswith("dense"):
        return lambda i: linear(rows, held[i % count])
    if name == "losa, dense bf16":
        return lambda i: dense_linear(rows, held[i % count])
    if (way := name.rpartition(", ")[2]) in WAYS:

        def forced(i: int) -> Tensor:
            with setting("LOSA_SPARSE_LINEAR", way):
                return sparse_linear(rows, held[i % count])

        return forced
    return lambda i: sparse_linear(rows, held[i % count])


def is_narrow(name: str) -> bool:
    """Whether x is bf16 too."""
    return "bf16" in name and not name.endswith("x fp32")


def failures(runs: dict[str, Callable], x: Tensor, weight: Tensor) -> dict[str, str]:
    """The forced ways that fail or differ from fp64 by more than the dtype's error, with the reason.

    Raises SystemExit: the result of another run, which a user would get, is wrong.
    """
    found = {}
    for name, run in runs.items():
        forced = name.rpartition(", ")[2] in WAYS
        rows = x.bfloat16() if is_narrow(name) else x
        expected = linear(rows.double(), weight.double())
        try:
            result = torch.as_tensor(run(0)).to(expected)
        except (RuntimeError, ValueError) as error:
            if not forced:
                raise
            found[name] = str(error).splitlines()[0]
            continue
        result = result if result.shape == expected.shape else result.reshape(expected.T.shape).T
        # The vendor's product may round its partial sums.
        share = 1e-4 if rows is x else (4 if name.startswith("dense") else 2) * torch.finfo(torch.bfloat16).eps
        error, allowed = float((result - expected).abs().max()), share * float(expected.abs().max())
        if not error <= allowed:
            if not forced:
                raise wrong_kernel("sparse_linear", f"{name} is wrong by more than {allowed:.2g}")
            found[name] = f"wrong by {error:.2g}, allowed {allowed:.2g}"
    return found
