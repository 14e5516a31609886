"""Packing and unpacking weights: native and reference, torch's own masked operations, and the copy bandwidth.

Bytes are those of the dense weight and of the packed one, each once; a copy's are what it reads and writes. The
operators are timed, without what the public functions check. Packing a bitmask waits for the host, which must know the
number of values: ``median_ms`` has that wait, ``kernels_ms`` (``--kernels``) is what the GPU works.
"""

from __future__ import annotations

from collections import deque

import torch

from benchmarks._sparse import add_options, copies, kept_mask, pack, run_slices
from benchmarks._timing import copy_bandwidth, interleaved, kernel_seconds, parser, rows
from losa_kernels import dispatch, pack_mask
from losa_kernels.packing import reference

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str]) -> int:
    options = parser("packing", __doc__)
    add_options(options)
    options.add_argument("--kernels", action="store_true", help="profile the GPU; may slow what comes after")
    args = options.parse_args(argv)
    limit = copy_bandwidth(args.device, 64 if args.quick else 256)
    dtypes = ["bf16"] if args.quick else list(DTYPES)
    run_slices(
        "packing",
        args,
        lambda shape, pattern: [row for dtype in dtypes for row in measure(shape, pattern, dtype, limit, args)],
    )
    return 0


def measure(shape: tuple[int, int], pattern: str, dtype: str, limit: float, args) -> list[dict]:
    repetitions = 5 if args.quick or shape[0] * shape[1] > 1 << 21 else 15
    weight = torch.randn(shape, device=args.device).to(DTYPES[dtype])
    kept = kept_mask(shape, pattern, args.device)
    packed, mask, dense = pack(weight, kept, pattern), pack_mask(kept), weight.masked_fill(~kept, 0)
    if not torch.equal(packed.unpack(), dense):
        raise SystemExit("packing: round trip failed; not timing a wrong kernel")
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
    # Results live on for a few runs: the next ones go to other memory, which is not in the GPU's cache either.
    results = deque(maxlen=len(weights) if on_gpu else 0)
    for direction, named in candidates.items():
        runs = {name: lambda i, run=run: results.append(run(i)) for name, run in named.items()}
        times = interleaved(runs, repetitions, args.device)
        found += rows(times, "reference", op=direction, shape=f"{shape[0]}x{shape[1]}", pattern=pattern, dtype=dtype)
        for row in found[-len(runs) :]:
            row["fraction_of_copy_bandwidth"] = moved / (row["median_ms"] / 1e3) / limit
        if on_gpu and args.kernels and (taken := kernel_seconds(runs["dispatched"], repetitions)):
            found[-1] |= {"kernels_ms": 1e3 * taken, "kernels_fraction": moved / taken / limit}
    return found
