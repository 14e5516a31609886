"""Packing and unpacking masks: native and reference against numpy.packbits and the copy bandwidth."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks._timing import SHAPES, copy_bandwidth, interleaved, parser, report, rows
from losa_kernels import bitmask, dispatch, pack_mask, unpack_mask


def main(argv: list[str]) -> int:
    args = parser("bitmask", __doc__).parse_args(argv)
    device = args.device
    limit = copy_bandwidth(device, 64 if args.quick else 256)
    shapes = SHAPES["smollm2"][:1] + SHAPES["llama2-7b"][:1] if args.quick else sum(SHAPES.values(), [])
    results = []
    for out_features, in_features in shapes:
        copies = max(2, min(8, (64 << 20) // (out_features * in_features)))
        masks = [torch.rand(out_features, in_features, device=device) > 0.7 for _ in range(copies)]
        packed = [pack_mask(m) for m in masks]
        if not all(torch.equal(unpack_mask(p, in_features), m) for p, m in zip(packed, masks, strict=True)):
            raise SystemExit("bitmask: round trip failed; not timing a wrong kernel")
        arrays = [m.cpu().numpy() for m in masks]
        backend = dispatch.chosen("pack_mask", torch.device(device))
        candidates = {
            "pack": {
                "reference": lambda i: bitmask.pack_reference(masks[i % copies]),
                "numpy": lambda i: np.packbits(arrays[i % copies], axis=1, bitorder="little"),
                backend: lambda i: pack_mask(masks[i % copies]),
            },
            "unpack": {
                "reference": lambda i: bitmask.unpack_reference(packed[i % copies], in_features),
                backend: lambda i: unpack_mask(packed[i % copies], in_features),
            },
        }
        for direction, runs in candidates.items():
            found = rows(
                interleaved(runs, 5 if args.quick else 25, device),
                "reference",
                op=direction,
                shape=f"{out_features}x{in_features}",
            )
            for row in found:
                moved = out_features * in_features * 1.125
                row["fraction_of_copy_bandwidth"] = moved / (row["median_ms"] / 1e3) / limit
            results += found
    report("bitmask", results, args.json, device)
    return 0
