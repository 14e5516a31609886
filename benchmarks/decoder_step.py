"""What stands between the products of a decode step: our kernel for each against the same in plain PyTorch calls.

``fraction_of_copy_bandwidth``: the time to move each byte once at copy speed over the time taken. ``host_ms``:
launching it, which a CUDA graph hides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks._timing import copy_bandwidth, host_seconds, interleaved, parser, report, rotation, rows
from losa_kernels import decoder_step
from losa_kernels.decoder_step import reference

# hidden, intermediate, heads, key heads, head size; LLaMA-2-7B's and Llama-3.1-8B's
MODELS = {"llama2-7b": (4096, 11008, 32, 32, 128), "llama3-8b": (4096, 14336, 32, 8, 128)}
PLACES = (512, 4096)


def main(argv: list[str]) -> int:
    args = parser("decoder_step", __doc__).parse_args(argv)
    limit = copy_bandwidth(args.device, 64 if args.quick else 256)
    models = dict(list(MODELS.items())[:1]) if args.quick else MODELS
    found = (row for name, sizes in models.items() for row in measure(name, sizes, limit, args))
    report("decoder_step", found, args.json, args.device)
    return 0


@torch.inference_mode()
def measure(model: str, sizes: tuple[int, ...], limit: float, args) -> list[dict]:
    hidden, intermediate, queries, keys, size = sizes
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    normal = partial(torch.randn, device=args.device, dtype=dtype)
    repetitions = 5 if args.quick else 15
    cos, sin = normal(PLACES[-1], size), normal(PLACES[-1], size)
    finished, scaling = torch.zeros(queries, dtype=torch.int32, device=args.device), size**-0.5
    found = []
    problems: dict[str, tuple[str, Callable[[], tuple], Callable[[tuple], int]]] = {
        "residual and norm": (
            "add_rms_norm",
            lambda: (normal(1, hidden), normal(1, hidden), normal(hidden), 1e-5),
            lambda a: 5 * a[0].nbytes,
        ),
        "gated SiLU": ("gated_silu", lambda: (normal(1, 2 * intermediate),), lambda a: a[0].nbytes * 3 // 2),
    }
    for places in PLACES[:1] if args.quick else PLACES:
        at = torch.tensor([places - 1], device=args.device)

        def cache(places=places):
            return normal(2, keys, places, size)

        problems[f"rotary and cache, {places}"] = (
            "rotate_and_store",
            lambda at=at, cache=cache: (normal(queries + 2 * keys, size), cos, sin, at, cache(), None, None, 1e-5),
            lambda a: 2 * a[0].nbytes,
        )
        problems[f"attention, {places}"] = (
            "attend_cache",
            lambda at=at, cache=cache, places=places: (normal(queries, size), cache(), at, places, scaling, finished),
            lambda a: 2 * a[0].nbytes + a[1].nbytes,
        )
    for label, (name, make, moved) in problems.items():
        first = make()
        bytes_moved = moved(first)
        count = rotation(sum(t.nbytes for t in first if isinstance(t, Tensor)), args.device, repetitions)
        given = [first, *(make() for _ in range(count - 1))]
        check(name, given[0])
        functions = {"plain": getattr(reference, name), "losa": getattr(decoder_step, name)}
        runs = {which: partial(in_turn, function, given) for which, function in functions.items()}
        times = interleaved(runs, repetitions, args.device)
        for row in rows(times, "plain", op=label, model=model, dtype=str(dtype).removeprefix("torch.")):
            row["fraction_of_copy_bandwidth"] = bytes_moved / (row["median_ms"] / 1e3) / limit
            if args.device.startswith("cuda"):
                row["host_ms"] = 1e3 * host_seconds(runs[row["implementation"]], args.device)
            found.append(row)
    return found


def in_turn(function: Callable, given: list[tuple], i: int) -> Tensor:
    return function(*given[i % len(given)])


def check(name: str, given: tuple) -> None:
    def result(function: Callable, change: Callable[[Tensor], Tensor]) -> Tensor:
        fresh = [change(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in given]
        return function(*fresh).double()

    ours = result(getattr(decoder_step, name), torch.clone)
    plain = result(getattr(reference, name), torch.clone)
    truth = result(getattr(reference, name), Tensor.double)
    eps = torch.finfo(given[0].dtype).eps
    if not (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + eps * truth.abs().max():
        raise SystemExit(
            f"decoder_step: {name} differs from fp64 by more than its dtype's error; not timing a wrong kernel"
        )
