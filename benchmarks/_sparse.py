"""Masks, copies to rotate through and runs in slices, for the benchmarks of packed weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from benchmarks._machine import differences, machine, origin
from benchmarks._problems import SHAPES, shape_name, sizes
from benchmarks._results import read_document, report, write_document
from benchmarks._timing import rotation
from losa_kernels import pack_bitmask, pack_mask, pack_nm

PATTERNS = ("50%", "60%", "70%", "80%", "2:4", "4:8", "2:8")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=shapes, metavar="OUTxIN,...", help="default: linears of SmolLM2 and LLaMA-2-7B"
    )
    parser.add_argument(
        "--patterns", metavar="P,...", help=f"of {', '.join(PATTERNS)}; N:M keeps N of M".replace("%", "%%")
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json and measure the missing ones")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="begin no new shape or pattern after S; see --resume"
    )


def shapes(text: str) -> list[tuple[int, ...]]:
    return [sizes(2)(shape) for shape in text.split(",")]


def run_slices(
    name: str, args: argparse.Namespace, measure: Callable[[tuple[int, int], str], list[dict]]
) -> list[dict]:
    """``measure`` for every shape and pattern. With --json the file is written after each, so that a long run can be
    cut into short ones.

    Raises SystemExit: --resume without --json, or rows of another machine.
    """
    if args.resume and args.json is None:
        raise SystemExit(f"{name}: --resume needs --json")
    document = {"benchmark": name, "machine": machine(args.device), "origin": origin(), "rows": []}
    if args.resume and args.json.exists():
        before = read_document(name, args.json)
        here = document["machine"]
        if differences(before["machine"], here):
            raise SystemExit(f"{name}: the rows of {args.json} were measured on {before['machine']}, this is {here}")
        document |= {"origin": origin(before.get("origin", {})), "rows": before["rows"]}
    results, start = document["rows"], time.monotonic()
    for shape in shapes_of(args):
        for pattern in patterns_of(args):
            done = any(r["shape"] == shape_name(shape) and r["pattern"] == pattern for r in results)
            if done or (args.seconds is not None and time.monotonic() - start > args.seconds):
                continue
            results += [
                {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
                for row in measure(shape, pattern)
            ]
            if args.json is not None:
                write_document(args.json, document)
    if not args.resume:
        report(name, results, args.json, args.device)
    return results


def shapes_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    small, large = SHAPES["smollm2"], SHAPES["llama2-7b"]
    return args.shapes or (small[:1] + large[:1] if args.quick else small + large)


def patterns_of(args: argparse.Namespace) -> list[str]:
    if args.patterns:
        return args.patterns.split(",")
    return ["50%", "2:4"] if args.quick else list(PATTERNS)


def kept_mask(shape: tuple[int, int], pattern: str, device: str) -> Tensor:
    """A random bool mask of ``shape``, True where a weight is kept: "70%" prunes 70 %, "2:8" keeps 2 of every 8."""
    scores = torch.rand(shape, device=device)
    if pattern.endswith("%"):
        return scores >= float(pattern[:-1]) / 100
    keep_n, m = (int(part) for part in pattern.split(":"))
    groups = scores.reshape(-1, m)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(keep_n, 1).indices, True).reshape(shape)


def pack(weight: Tensor, kept: Tensor, pattern: str):
    if pattern.endswith("%"):
        return pack_bitmask(weight, pack_mask(kept))
    return pack_nm(weight, pack_mask(kept), *(int(part) for part in pattern.split(":")))


def copies(thing, repetitions: int) -> list:
    """The tensor or packed weight with as many clones of it as exceed the device's cache; see ``rotation``."""
    count = rotation(thing.nbytes, thing.device, repetitions)
    return [thing, *(clone(thing) for _ in range(count - 1))]


def clone(thing):
    if isinstance(thing, Tensor):
        return thing.clone()
    return replace(
        thing, **{f.name: v.clone() for f in fields(thing) if isinstance(v := getattr(thing, f.name), Tensor)}
    )
