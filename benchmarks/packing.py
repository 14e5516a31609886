"""Packing and unpacking weights: native code and the reference, against torch's own masked operations.

fraction_of_copy_bandwidth: the bytes of the dense weight and of the packed one at the speed of a large copy, over the
time taken. The operators are timed, without the checks of the public functions.

Packing a bitmask waits for the host, which must know the number of values. median_ms includes this wait; kernels_ms
(with --kernels) is what the GPU works.
"""

from __future__ import annotations

from collections import deque

import torch

from benchmarks._problems import DTYPES, shape_name, wrong_kernel
from benchmarks._results import parser, rows
from benchmarks._sparse import add_options, copies, kept_mask, pack, run_slices
from benchmarks._timing import interleaved, kernel_seconds
from losa_kernels import dispatch, pack_mask
from losa_kernels.packing import reference
from losa_kernels.timing import copy_bandwidth


def main(argv: list[str]) -> int:
    options = parser("packing", __doc__)
    add_options(options)
    options.add_argument("--kernels", action="store_true", help="profile the GPU; may slow what comes after")
    args = options.parse_args(argv)
    limit = copy_bandwidth(args.device, 64 if args.quick else 256)
    dtypes = ["bf16"] if args.quick else ["bf16", "fp32"]
    run_slices(
        "packing",
        args,
        lambda shape, pattern: [row for dtype in dtypes for row in measure(shape, pattern, dtype, limit, args)],
    )
    return 0


def measure(shape: tuple[int, int], pattern: str, dtype: str, limit: float, args) -> list[dict]:
    repetitions = args.repetitions or (5 if args.quick or shape[0] * shape[1] > 1 << 21 else 15)
    weight = torch.randn(shape, device=args.device).to(DTYPES[dtype])
    kept = kept_mask(shape, pattern, args.device)
    packed, mask, dense = pack(weight, kept, pattern), pack_mask(kept), weight.masked_fill(~kept, 0)
    if not torch.equal(packed.unpack(), dense):
        raise wrong_kernel("packing", "round trip failed")
    weights, packs = copies(weight, repetitions), copies(packed, repetitions)
    offsets = getattr(packed, "row_offsets", None)
    name, pattern_args = ("pack_bitmask", ()) if offsets is not None else ("pack_nm", (packed.keep_n, packed.m))
    pack_here = dispatch.implementation(name, args.device)
    pack_reference = getattr(reference, name)
    candidates = {
        "pack": {
            "reference": lambda i: pack_reference(weights[i % len(weights)], mask, *pattern_args),
            "torch.masked_select": lambda i: torch.masked_select(weights[i % len(weights)], kept),
            "dispatched": lambda i: pack_here(weights[i % len(weights)], mask, *pattern_args),
        },
        "unpack": {
            "reference": lambda i: reference.unpack_bitmask(packs[i % len(packs)].values, mask, None, shape),
            "torch.masked_scatter": lambda i: torch.zeros_like(weight).masked_scatter_(
                kept, packs[i % len(packs)].values
            ),
            "dispatched": lambda i: packs[i % len(packs)].unpack(),
        },
    }
    found, moved, on_gpu = [], weight.nbytes + packed.nbytes, args.device.startswith("cuda")
    # The results of a few runs are kept: the next results go to other memory, which is not in the GPU's cache either.
    results = deque(maxlen=len(weights) if on_gpu else 0)
    for direction, named in candidates.items():
        runs = {name: lambda i, run=run: results.append(run(i)) for name, run in named.items()}
        times = interleaved(runs, repetitions, args.device)
        found += rows(times, "reference", op=direction, shape=shape_name(shape), pattern=pattern, dtype=dtype)
        for row in found[-len(runs) :]:
            row["fraction_of_copy_bandwidth"] = moved / (row["median_ms"] / 1e3) / limit
        if on_gpu and args.kernels and (taken := kernel_seconds(runs["dispatched"], repetitions)):
            found[-1] |= {"kernels_ms": 1e3 * taken, "kernels_fraction": moved / taken / limit}
    return found
