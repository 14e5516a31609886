"""What the Triton masked-LoRA linear decides before it launches: fused or composed, and which tile.

``LOSA_MASKED_LORA=auto`` chooses the way by measurement at the first call of a shape, as the tile is always chosen
(``losa_kernels.measured``). Where nothing is measured, ``fused`` and ``fused_projection`` predict the way, and the tile
is the first of its list that the device has the shared memory for. Tiles differ in their order of summation, so torch's
deterministic mode measures nothing: runs repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from triton.runtime.errors import OutOfResources

from losa_kernels import measured, settings
from losa_kernels.dispatch import interpreted

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


class Tile(NamedTuple):
    """rows x columns of the result, the step along the reduction, warps of 32 threads, stages of the load pipeline.

    In a tile of ``linear``, rows are rows of W_eff (or W_eff^T) and columns are tokens. In a tile of ``project``, rows
    and columns are G's. Where G is given, step is the number of rows that a program walks down.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.step} w{self.warps} s{self.stages}"


# By who multiplies: 90 is wgmma (and tcgen05, into which Triton turns it on 10.x), 80 is mma, which 8.x and 12.x have.
# The first of each list that fits the device's shared memory is what runs unmeasured. A multiprocessor has 227 KB for a
# program on 9.0 and 10.0, 163 KB on 8.0, and 99 KB on 8.6, 8.9 and 12.0, which at least one tile of each list of 80
# fits. tests/native/test_triton_aot.py compiles every tile for all of them: none spills a register.
LINEAR: dict[int, tuple[Tile, ...]] = {
    # With 64 rows two programs fit a multiprocessor, and one's product hides the other's forming of W_eff; 256 tokens
    # halve what forming it costs per product. On an H100, 4096 x 4096, rank 8, 4096 tokens: 487, 353 and 562 us
    # forward, 749, 519 and 904 us for the gradient of x.
    90: (Tile(64, 128, 64, 4, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    80: (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 128, 32, 4, 4)),
}
# Up to 64 tokens the kernel streams W: many bytes in flight matter, not the shape of the product.
LINEAR_FEW_TOKENS: dict[int, tuple[Tile, ...]] = {
    90: (Tile(64, 64, 64, 4, 4), Tile(64, 32, 128, 4, 4), Tile(64, 16, 128, 4, 4)),
    80: (Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4), Tile(64, 16, 64, 4, 4)),
}
# Ranks for which the inner side of B A is longer than 96 leave less room.
LINEAR_HIGH_RANK: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2)),
    80: (Tile(64, 64, 32, 4, 2),),
}
# Rows that are not aligned to 16 bytes are loaded by elements, each with an address in registers, hence 8 warps.
LINEAR_UNALIGNED: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 32, 8, 2),), 80: (Tile(64, 64, 16, 8, 2),)}
# Two accumulators (gradient of x), or two main products per step.
LINEAR_DROPOUT: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 64, 64, 8, 3), Tile(64, 128, 32, 4, 3)),
    80: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
}
# tl.dot on fp32 in full precision runs on the fp32 units.
LINEAR_FP32: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 16, 8, 2),), 80: (Tile(64, 64, 16, 8, 2),)}
PROJECT: dict[int, tuple[Tile, ...]] = {
    90: (Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3)),
    80: (Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 3)),
}
PROJECT_UNALIGNED: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 32, 4, 2),), 80: (Tile(64, 64, 32, 8, 2),)}
PROJECT_FP32: dict[int, tuple[Tile, ...]] = {90: (Tile(64, 64, 16, 8, 2),), 80: (Tile(64, 64, 16, 8, 2),)}
# By the terms in which G, from memory, goes into the products; 0 is fp32.
PROJECT_GIVEN: dict[int, tuple[Tile, ...]] = {
    0: (Tile(32, 64, 256, 8, 2),),
    1: (Tile(32, 128, 512, 4, 3), Tile(64, 128, 512, 4, 3)),
    2: (Tile(32, 64, 512, 4, 3),),
}
# Ragged tiles carry predicates and addresses in registers, hence few elements a thread; so do products of fp32 terms.
COMPOSE_DIRECT, COMPOSE_DIRECT_RAGGED = Tile(64, 128, 0, 8, 1), Tile(32, 64, 0, 8, 1)
COMPOSE = {90: Tile(64, 128, 0, 4, 1), 80: Tile(64, 128, 0, 8, 1)}
COMPOSE_RAGGED = Tile(64, 64, 0, 8, 1)
SUM = Tile(16, 256, 0, 4, 1)  # shares at a time x elements
KEEP = Tile(16, 256, 0, 4, 1)
# Small enough that tests of a few rows have several programs and ragged edges.
INTERPRETED = Tile(32, 16, 32, 4, 1)


def architecture(device: torch.device) -> int:
    """10 * major + minor of the compute capability; 80 where there is no GPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def family(arch: int) -> int:
    """80 or 90: whose lists and figures to use."""
    return 90 if 90 <= arch < 120 else 80


def linear_tiles(
    arch: int, tokens: int, inner: int, wide: bool, dropout: bool, aligned: bool, whole: bool
) -> tuple[Tile, ...]:
    """Candidates of linear_kernel.

    Args:
        inner: HEAD + TAIL, the inner side of B A.
        wide: x is fp32.
        whole: W consists of whole tiles, which need no predicates; predicates would not fit the registers beside the
            largest tiles.
    """
    if interpreted():
        return (INTERPRETED,)
    if wide:
        return LINEAR_FP32[family(arch)]
    if not aligned:
        return LINEAR_UNALIGNED[family(arch)]
    if inner > 96:
        return LINEAR_HIGH_RANK[family(arch)]
    if dropout:
        return LINEAR_DROPOUT[family(arch)]
    if tokens <= 64:
        return tuple(tile for tile in LINEAR_FEW_TOKENS[family(arch)] if tile.columns < 2 * max(16, tokens))
    most_rows = 128 if whole or family(arch) == 90 else 64  # mma takes both operands from registers
    most_columns = 256 if whole and inner <= 64 and tokens > 128 else 128
    return tuple(t for t in LINEAR[family(arch)] if t.rows <= most_rows and t.columns <= most_columns)


def compose_tile(arch: int, rows: int, depth: int, direct: bool, wide: bool) -> Tile:
    """``direct``: by the ordinary units; else by tensor cores, or by fp32 units if the terms are ``wide``."""
    if interpreted():
        return INTERPRETED
    tile = COMPOSE[family(arch)]
    whole = rows % tile.rows == 0 and depth % tile.columns == 0
    if direct:
        return COMPOSE_DIRECT if whole else COMPOSE_DIRECT_RAGGED
    return tile if whole and not wide else COMPOSE_RAGGED


def project_tiles(arch: int, wide: bool, aligned: bool) -> tuple[Tile, ...]:
    """Candidates of project_kernel."""
    if interpreted():
        return (INTERPRETED._replace(columns=32, step=16),)
    return (PROJECT_FP32 if wide else PROJECT if aligned else PROJECT_UNALIGNED)[family(arch)]


def project_given_tiles(terms: int) -> tuple[Tile, ...]:
    """Candidates of project_given_kernel."""
    return (INTERPRETED._replace(columns=32, step=64),) if interpreted() else PROJECT_GIVEN[terms]


_too_large: set[tuple] = set()


def run_fastest(
    op: str, key: tuple, candidates: Mapping[Name, Callable[[], Result]], device: torch.device, table: Name
) -> Result:
    """What the candidate that ``measured.fastest`` chooses returns.

    A candidate that asks for more shared memory than the device has is passed over, now and later. Only Triton knows
    beforehand how much a tile takes: the same tile takes twice as much by one version as by another.
    """
    fitting = {name: run for name, run in candidates.items() if (op, key, device, name) not in _too_large}
    # Where nothing fits, the last one says why.
    fitting = fitting or dict([list(candidates.items())[-1]])
    chosen = measured.fastest(op, key, fitting, device, table)
    for name in sorted(fitting, key=lambda name: name != chosen):
        try:
            return fitting[name]()
        except OutOfResources as error:
            _too_large.add((op, key, device, name))
            last = error
    raise last


def tuned(op: str, key: tuple, tiles: Sequence[Tile], device: torch.device, run: Callable[[Tile], Result]) -> Result:
    """What ``run`` returns for the fastest of ``tiles``; ``run`` launches the kernel, and may do so many times."""
    candidates = {tile: partial(run, tile) for tile in tiles}
    return run_fastest(f"masked LoRA, {op}", key, candidates, device, tiles[0])


def words(**conditions: bool) -> tuple[str, ...]:
    """The names of the conditions that hold, for a key that can be read."""
    return tuple(name for name, holds in conditions.items() if holds)


def by_way(
    op: str,
    key: tuple,
    wide: bool,
    device: torch.device,
    predicted: bool,
    fused: Callable[[], Result],
    compose: Callable[[], Result],
) -> Result:
    """What ``fused`` or ``compose`` returns: as LOSA_MASKED_LORA says, or the faster; ``predicted``: fused, where
    nothing may be measured. fp32 composes: tl.dot has no tensor cores for full fp32, and the vendor's GEMM honours
    torch's own switch for tf32."""
    ways, way = {"fused": fused, "compose": compose}, settings.MASKED_LORA()
    if way == "auto" and wide:
        way = "compose"
    if way != "auto":
        return ways[way]()
    return run_fastest(f"masked LoRA, {op}", key, ways, device, "fused" if predicted else "compose")


class Machine(NamedTuple):
    """What decides between the ways.

    FLOP/s in bf16 of the vendor's GEMM and of the fused kernel, forward and for the gradient of x, the terms of B A
    counted; FLOP/s at which G is formed in registers, and the seconds that an element of it then takes to project;
    bytes/s of a large copy; multiprocessors.
    """

    vendor_flops: float
    forward_flops: float
    gradient_flops: float
    project_flops: float
    project_seconds: float
    bytes: float
    units: int


# H100: measured on one (benchmarks/results/nvidia-h100-80gb-hbm3.json, 4096 x 4096, rank 8, 4096 tokens): the GEMM
# (171 us), the fused kernel by its tile of 64 x 128 (487 and 749 us), G in registers (283 us), a copy. How the 283 us
# divide is inferred: 40 for the projection, which is what a kernel that loads G in fp32 took beyond loading it. The
# projection has changed since. A100: nothing measured; 80 % of its data sheet, and the H100's proportions. The A100
# stands for 8.6, 8.9 and 12.0 as well, whose operations a byte are about as many.
MACHINES = {
    90: Machine(800e12, 350e12, 229e12, 566e12, 2.4e-12, 2.99e12, 132),
    80: Machine(250e12, 109e12, 72e12, 177e12, 4.5e-12, 1.6e12, 108),
}
LAUNCH_SECONDS = 3e-6


def fused(
    tokens: int, rows: int, columns: int, inner: int, arch: int, transposed: bool = False, dropout: bool = False
) -> bool:
    """Whether the product with W_eff (rows, columns) is predicted to take less time where W_eff is formed in registers
    than where it is composed in memory.

    Composing moves W and W_eff through memory once and leaves the product to the vendor's GEMM. The fused kernel reads
    W alone, runs at less than half the GEMM's rate and also pays inner / BT of the product, where its tile has BT = 128
    tokens and ``inner`` is HEAD + TAIL: it is for small batches and ranks.

    Args:
        transposed: the product is the gradient of x.
        dropout: there are two products either way; composing also takes a second matrix and a pass over x.
    """
    machine, size, products = MACHINES[family(arch)], rows * columns, 2 if dropout else 1
    tile = min(128, max(16, tokens))
    # A program occupies one unit however few there are; the vendor's GEMM divides the reduction when they are few.
    busy = min(1.0, ceil_div(columns if transposed else rows, 64) * ceil_div(tokens, tile) / machine.units)
    operations = 2 * size * ceil_div(tokens, tile) * (products * tile + inner)
    rate = machine.gradient_flops if transposed else machine.forward_flops
    in_registers = max(operations / (rate * busy), 2 * size / machine.bytes)
    product = max(2 * tokens * size / machine.vendor_flops, 2 * size / machine.bytes)
    moved = (2 + 2 * products) * size + (4 * tokens * columns if dropout else 0)
    composed = moved / machine.bytes + (2 * products - 1) * LAUNCH_SECONDS + products * product
    return in_registers <= composed


def fused_projection(tokens: int, rows: int, columns: int, itemsize: int, arch: int) -> bool:
    """The same for M * G: from its accumulators, or G, ``itemsize`` bytes an element, by the vendor's GEMM."""
    machine, size = MACHINES[family(arch)], rows * columns
    in_registers = 2 * tokens * size / machine.project_flops + size * machine.project_seconds
    product = max(2 * tokens * size / machine.vendor_flops, itemsize * size / machine.bytes)
    return in_registers <= product + itemsize * size / machine.bytes + LAUNCH_SECONDS


# Plain functions: triton.cdiv and its like are callable by kernels too, and cost the host microseconds.
def ceil_div(value: int, step: int) -> int:
    return -(-value // step)


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


@cache
def inner_split(inner: int) -> tuple[int, int]:
    """(HEAD, TAIL), powers of two from 16 on (or TAIL 0), with the smallest sum >= inner: what tl.dot can multiply."""
    head = 16
    while 2 * head <= inner:
        head *= 2
    if inner <= head:
        return head, 0
    return (head, head // 2) if head > 16 and inner <= head + head // 2 else (2 * head, 0)
