"""What stands between the products of a decode step: our kernel for each operation, against plain PyTorch calls.

fraction_of_copy_bandwidth: the time to move each byte once at the speed of a copy, over the time taken. host_ms: the
host's time to launch the operation, which a CUDA graph hides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks._problems import dtype_name, wrong_kernel
from benchmarks._results import parser, report, rows
from benchmarks._timing import host_seconds, interleaved, rotation
from losa_kernels import decoder_step
from losa_kernels.decoder_step import reference
from losa_kernels.timing import copy_bandwidth

# hidden, intermediate, heads, key heads, head size of LLaMA-2-7B and Llama-3.1-8B
MODELS = {"llama2-7b": (4096, 11008, 32, 32, 128), "llama3-8b": (4096, 14336, 32, 8, 128)}
PLACES = (512, 4096)  # of the cache, that are filled


class Operation(NamedTuple):
    function: str  # its name in losa_kernels.decoder_step and in its reference
    arguments: Callable[[], tuple]  # makes new ones
    moved: Callable[[tuple], int]  # bytes that it moves with these arguments


def main(argv: list[str]) -> int:
    args = parser("decoder_step", __doc__).parse_args(argv)
    limit = copy_bandwidth(args.device, 64 if args.quick else 256)
    models = dict(list(MODELS.items())[:1]) if args.quick else MODELS
    found = (row for name, sizes in models.items() for row in measure(name, sizes, limit, args))
    report("decoder_step", found, args.json, args.device)
    return 0


def operations(sizes: tuple[int, ...], all_places: tuple[int, ...], device: str, dtype: torch.dtype) -> dict:
    """``Operation`` by label; see ``MODELS`` for ``sizes``."""
    hidden, intermediate, queries, keys, size = sizes
    normal = partial(torch.randn, device=device, dtype=dtype)
    cos, sin = normal(PLACES[-1], size), normal(PLACES[-1], size)
    finished, scaling = torch.zeros(queries, dtype=torch.int32, device=device), size**-0.5
    found = {
        "residual and norm": Operation(
            "add_rms_norm",
            lambda: (normal(1, hidden), normal(1, hidden), normal(hidden), 1e-5),
            lambda a: 5 * a[0].nbytes,
        ),
        "gated SiLU": Operation("gated_silu", lambda: (normal(1, 2 * intermediate),), lambda a: a[0].nbytes * 3 // 2),
    }
    for places in all_places:
        at = torch.tensor([places - 1], device=device)

        def cache(places=places):
            return normal(2, keys, places, size)

        found[f"rotary and cache, {places}"] = Operation(
            "rotate_and_store",
            lambda at=at, cache=cache: (normal(queries + 2 * keys, size), cos, sin, at, cache(), None, None, 1e-5),
            lambda a: 2 * a[0].nbytes,
        )
        found[f"attention, {places}"] = Operation(
            "attend_cache",
            lambda at=at, cache=cache, places=places: (normal(queries, size), cache(), at, places, scaling, finished),
            lambda a: 2 * a[0].nbytes + a[1].nbytes,
        )
    return found


@torch.inference_mode()
def measure(model: str, sizes: tuple[int, ...], limit: float, args) -> list[dict]:
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    repetitions = args.repetitions or (5 if args.quick else 15)
    found = []
    all_places = PLACES[:1] if args.quick else PLACES
    for label, (name, make, moved) in operations(sizes, all_places, args.device, dtype).items():
        first = make()
        bytes_moved = moved(first)
        count = rotation(sum(t.nbytes for t in first if isinstance(t, Tensor)), args.device, repetitions)
        given = [first, *(make() for _ in range(count - 1))]
        check(name, given[0])
        functions = {"plain": getattr(reference, name), "losa": getattr(decoder_step, name)}
        runs = {which: partial(in_turn, function, given) for which, function in functions.items()}
        times = interleaved(runs, repetitions, args.device)
        for row in rows(times, "plain", op=label, model=model, dtype=dtype_name(dtype)):
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
        raise wrong_kernel("decoder_step", f"{name} differs from fp64 by more than its dtype's error")
