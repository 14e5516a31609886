"""What the Triton masked-LoRA linear decides before it launches: fused or composed, and which tile.

``LOSA_MASKED_LORA`` = ``auto`` (default) | ``fused`` | ``compose``; read at every call.
``LOSA_AUTOTUNE`` = ``1`` (default) | ``0``: time the candidate tiles of a new shape on its first call, or take the
first of the list. Tiles differ in their order of summation, so ``torch.use_deterministic_algorithms(True)`` takes the
first as well: runs repeat bit for bit. So does CUDA graph capture, in which nothing can be timed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

logger = logging.getLogger("losa_kernels")

WAYS = ("auto", "fused", "compose")


class Tile(NamedTuple):
    """rows x columns of the result, the step along the reduction, warps of 32 threads, stages of the load pipeline.

    ``linear``: rows are those of W_eff (or W_eff^T), columns are tokens. ``project``: rows x columns of G.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


# The first of each list is what runs untuned. tests/test_triton_aot.py compiles every one for its architecture: none
# spills a register.
LINEAR: dict[int, tuple[Tile, ...]] = {
    # 8 warps are two warpgroups of 64 rows. 256 tokens halve what forming W_eff costs per product; with 64 rows two
    # programs fit a multiprocessor, and one's product hides the other's forming of W_eff.
    90: (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 3)),
    80: (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 128, 32, 4, 4)),
}
# Up to 64 tokens the kernel streams W: many bytes in flight matter, not the shape of the product.
LINEAR_FEW_TOKENS: dict[int, tuple[Tile, ...]] = {
    90: (Tile(64, 64, 64, 4, 4), Tile(64, 32, 128, 4, 4), Tile(64, 16, 128, 4, 4)),
    80: (Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4), Tile(64, 16, 64, 4, 4)),
}
# Ranks whose factors are deeper than 96 leave less room.
LINEAR_HIGH_RANK: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    80: (Tile(64, 64, 32, 4, 2),),
}
# Rows that are not aligned to 16 bytes are loaded by elements, each with an address in registers.
LINEAR_UNALIGNED: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 32, 4, 2),), 80: (Tile(64, 64, 32, 8, 2),)}
# Two accumulators (gradient of x), or two main products per step.
LINEAR_DROPOUT: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 64, 64, 8, 3), Tile(64, 128, 32, 4, 3)),
    80: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
}
# tl.dot on fp32 in full precision runs on the fp32 units.
LINEAR_FP32: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 16, 8, 2),), 80: (Tile(64, 64, 16, 8, 2),)}
PROJECT: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4)),
    80: (Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4)),
}
PROJECT_UNALIGNED: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 32, 4, 2),), 80: (Tile(64, 64, 32, 4, 2),)}
PROJECT_FP32: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 16, 8, 2),), 80: (Tile(64, 64, 16, 8, 2),)}
# G comes from memory: no loop to pipeline.
PROJECT_GIVEN: dict[int, tuple[Tile, ...]] = {90: (Tile(128, 128, 64, 8, 1),), 80: (Tile(64, 128, 32, 8, 1),)}
COMPOSE, COMPOSE_FP32 = Tile(64, 128, 0, 4, 1), Tile(64, 64, 0, 8, 1)
# Small enough that tests of a few rows have several programs and ragged edges.
INTERPRETED = Tile(32, 16, 32, 4, 1)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def architecture(device: torch.device) -> int:
    """80 or 90: whose lists and figures to use."""
    return 90 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else 80


def linear_tiles(
    arch: int, tokens: int, depth: int, wide: bool, dropout: bool, aligned: bool, whole: bool
) -> tuple[Tile, ...]:
    """Candidates of linear_kernel; ``depth`` is the factors', HEAD + TAIL; ``wide``: x is fp32; ``whole``: W consists
    of whole tiles, which spares the predicates that would not fit the registers beside the largest tile."""
    if interpreted():
        return (INTERPRETED,)
    if wide:
        return LINEAR_FP32[arch]
    if not aligned:
        return LINEAR_UNALIGNED[arch]
    if depth > 96:
        return LINEAR_HIGH_RANK[arch]
    if dropout:
        return LINEAR_DROPOUT[arch]
    if tokens <= 64:
        return tuple(tile for tile in LINEAR_FEW_TOKENS[arch] if tile.columns < 2 * max(16, tokens))
    return tuple(tile for tile in LINEAR[arch] if tile.columns < 256 or (whole and depth <= 64 and tokens > 128))


def compose_tile(wide: bool) -> Tile:
    return INTERPRETED if interpreted() else COMPOSE_FP32 if wide else COMPOSE


def project_tiles(arch: int, wide: bool, aligned: bool, given: bool) -> tuple[Tile, ...]:
    """Candidates of project_kernel; ``given``: G is loaded."""
    if interpreted():
        return (INTERPRETED._replace(columns=32, step=16),)
    if wide:
        return PROJECT_FP32[arch]
    return (PROJECT_GIVEN if given else PROJECT if aligned else PROJECT_UNALIGNED)[arch]


_best: dict[tuple, Tile] = {}


def tuned(key: tuple, tiles: Sequence[Tile], device: torch.device, run: Callable[[Tile], None]) -> Tile:
    """The fastest of ``tiles`` for ``key``; ``run`` launches the kernel, and may do so many times."""
    if len(tiles) == 1 or device.type != "cuda" or not _may_tune():
        return tiles[0]
    if key not in _best:
        times = {tile: _milliseconds(run, tile) for tile in tiles}
        _best[key] = min(times, key=times.__getitem__)
        logger.info("%s: %s of %s ms", key, tuple(_best[key]), {tuple(k): round(v, 4) for k, v in times.items()})
    return _best[key]


def _may_tune() -> bool:
    wanted = os.environ.get("LOSA_AUTOTUNE", "1") != "0" and not torch.are_deterministic_algorithms_enabled()
    return wanted and not torch.cuda.is_current_stream_capturing()


def _milliseconds(run: Callable[[Tile], None], tile: Tile) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(lambda: run(tile), warmup=3, rep=15, return_mode="median")
    except OutOfResources:
        return float("inf")


# {80 or 90: {depth of the factors: tokens up to which the fused kernel is faster}}. What is measured goes here and
# replaces the arithmetic below; nothing is yet.
MEASURED_CROSSOVER: dict[int, dict[int, int]] = {}


class Machine(NamedTuple):
    """FLOP/s in bf16 of the vendor's GEMM and of the fused kernel; bytes/s of a large copy; multiprocessors."""

    vendor_flops: float
    fused_flops: float
    bytes: float
    units: int


# H100 SXM: what a bf16 GEMM and a copy reached on one. A100 SXM: 80 % of its data sheet. The fused kernel is assumed
# to reach 85 % of the vendor's rate.
MACHINES = {90: Machine(790e12, 670e12, 3.0e12, 132), 80: Machine(250e12, 212e12, 1.6e12, 108)}
LAUNCH_SECONDS = 3e-6


def fused(tokens: int, rows: int, columns: int, depth: int, wide: bool, arch: int) -> bool:
    """Whether the product with W_eff (rows, columns) is to form it in registers rather than compose it in memory.

    Composing moves W and W_eff through memory once and leaves the product to the vendor's GEMM. The fused kernel reads
    W alone and pays depth / BT of the product instead, BT = 128 tokens being its tile: small batches and ranks. fp32
    composes: tl.dot has no tensor cores for full fp32, and the vendor's GEMM honours torch's own switch for tf32.
    """
    way = _way()
    if way != "auto":
        return way == "fused"
    if wide:
        return False
    if depth in MEASURED_CROSSOVER.get(arch, {}):
        return tokens <= MEASURED_CROSSOVER[arch][depth]
    machine, size = MACHINES[arch], rows * columns
    tile = min(128, max(16, tokens))
    # A program occupies one unit however few there are; the vendor's GEMM divides the reduction when they are few.
    busy = min(1.0, _ceil(rows, 64) * _ceil(tokens, tile) / machine.units)
    operations = 2 * size * _ceil(tokens, tile) * (tile + depth)
    in_registers = max(operations / (machine.fused_flops * busy), 2 * size / machine.bytes)
    product = max(2 * tokens * size / machine.vendor_flops, 2 * size / machine.bytes)
    composed = 4 * size / machine.bytes + LAUNCH_SECONDS + product
    return in_registers <= composed


def fused_projection(tokens: int, rows: int, columns: int, wide: bool, arch: int) -> bool:
    """The same for M * G: from its accumulators, or G in fp32 slices by the vendor's GEMM, 8 bytes an element more."""
    way = _way()
    if way != "auto":
        return way == "fused"
    if wide:
        return False
    machine, size = MACHINES[arch], rows * columns
    in_registers = 2 * tokens * size / machine.fused_flops
    return in_registers <= 2 * tokens * size / machine.vendor_flops + 8 * size / machine.bytes + LAUNCH_SECONDS


def _way() -> str:
    way = os.environ.get("LOSA_MASKED_LORA", "auto").strip().lower() or "auto"
    if way not in WAYS:
        raise ValueError(f"LOSA_MASKED_LORA: expected {', '.join(WAYS)}; got {way!r}")
    return way


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


@cache
def factor_split(depth: int) -> tuple[int, int]:
    """(HEAD, TAIL), powers of two from 16 on (or TAIL 0), with the smallest sum >= depth: what tl.dot can multiply."""
    head = 16
    while 2 * head <= depth:
        head *= 2
    if depth <= head:
        return head, 0
    return (head, head // 2) if head > 16 and depth <= head + head // 2 else (2 * head, 0)
