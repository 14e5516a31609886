"""Packing and unpacking masks: native code and the reference, against numpy.packbits.

fraction_of_copy_bandwidth: the bytes of the mask and of the packed mask at the speed of a large copy, over the time
taken.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks._machine import has_kernels
from benchmarks._problems import SHAPES, shape_name, wrong_kernel
from benchmarks._results import parser, report, rows
from benchmarks._timing import interleaved, rotation
from losa_kernels import bitmask, pack_mask, unpack_mask
from losa_kernels.timing import copy_bandwidth


def main(argv: list[str]) -> int:
    args = parser("bitmask", __doc__).parse_args(argv)
    limit = copy_bandwidth(args.device, 64 if args.quick else 256)
    shapes = SHAPES["smollm2"][:1] + SHAPES["llama2-7b"][:1] if args.quick else SHAPES["smollm2"] + SHAPES["llama2-7b"]
    found = (row for shape in shapes for row in measure(*shape, limit, args))
    report("bitmask", found, args.json, args.device)
    return 0


def measure(out_features: int, in_features: int, limit: float, args) -> list[dict]:
    repetitions = args.repetitions or (5 if args.quick else 25)
    copies = rotation(out_features * in_features, args.device, repetitions)
    masks = [torch.rand(out_features, in_features, device=args.device) > 0.7 for _ in range(copies)]
    packed = [pack_mask(m) for m in masks]
    if not all(torch.equal(unpack_mask(p, in_features), m) for p, m in zip(packed, masks, strict=True)):
        raise wrong_kernel("bitmask", "round trip failed")
    arrays = [m.cpu().numpy() for m in masks]
    native = "native" if has_kernels(args.device) else "dispatched"
    candidates = {
        "pack": {
            "reference": lambda i: bitmask.pack_reference(masks[i % copies]),
            "numpy": lambda i: np.packbits(arrays[i % copies], axis=1, bitorder="little"),
            native: lambda i: pack_mask(masks[i % copies]),
        },
        "unpack": {
            "reference": lambda i: bitmask.unpack_reference(packed[i % copies], in_features),
            native: lambda i: unpack_mask(packed[i % copies], in_features),
        },
    }
    found = []
    for direction, runs in candidates.items():
        times = interleaved(runs, repetitions, args.device)
        found += rows(times, "reference", op=direction, shape=shape_name((out_features, in_features)))
    for row in found:
        moved = out_features * in_features * 1.125
        row["fraction_of_copy_bandwidth"] = moved / (row["median_ms"] / 1e3) / limit
    return found
