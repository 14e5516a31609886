"""Which way a product with few rows of x takes on a GPU where x and the weight have one 16-bit dtype:

* ``window``: csrc/cuda/sparse_linear/sparse_linear.cu, from the packed weight as it is;
* ``tiles``: csrc/cuda/sparse_linear/tiles.cu, from the weight in tiles (tiles.py), which take about its bytes again;
* ``unpack``: the dense weight as a temporary, and torch's product.

The first eager call of a shape times all three (``losa_kernels.measured``); where nothing may be timed :func:`table`
decides. ``LOSA_SPARSE_LINEAR`` forces one.

Tiles are made at a weight's first call that takes them, hang on the packed weight and go with it: files, copies and
other devices do not have them. They are made only while ``FREE`` of the device's memory stays free, never during a
capture, and are let go where the measurement chooses another way. Parts of one weight (``packing.rows``) share its.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from losa_kernels import measured, settings
from losa_kernels.cuda_graphs import capturing
from losa_kernels.cuda_memory import free_bytes
from losa_kernels.packing import Packed, PackedNM
from losa_kernels.packing.rows import whole_of
from losa_kernels.sparse_linear import tiles
from losa_kernels.sparse_linear.tiles import Tiles

WAYS = settings.SPARSE_LINEAR.values[1:]  # window, tiles, unpack
BATCHES = (1, 2, 4, 8, 16)  # a measurement holds up to the next of these: the kernels are compiled for them
FREE = 1 / 8  # of the device's memory
TILES_MAJOR = 9  # compute capability from which bulk copies bring tiles
WINDOW_ROWS = 4


@dataclass(eq=False)
class Held:
    """What a packed weight carries for this module."""

    key: tuple  # of its measurements, without the batch
    tiles: Tiles | None = None
    refused: bool = False  # there was no memory for tiles
    taken: bool = False  # tiles were chosen once: a graph may hold them from then on
    ways: dict[int, str] = field(default_factory=dict)  # by batch, as last chosen


def choose(x: Tensor, packed: Packed, run) -> str:
    """The way for x of 1 to 16 rows, and a weight of which there can be tiles.

    Args:
        run: (way) -> the product by it; for ``tiles``, :func:`tiles_of` has them.

    Raises:
        ValueError: ``LOSA_SPARSE_LINEAR`` has a value that it does not know.
        RuntimeError: it asks for tiles during a capture, and there are none yet.
    """
    wanted, batch = settings.SPARSE_LINEAR(), batch_of(x.numel() // packed.shape[1])
    if torch.compiler.is_compiling():
        return _in_graph(packed, wanted, batch)
    if wanted == "tiles":
        _make_forced(packed)
    if wanted != "auto":
        held_by(packed).ways[batch] = wanted
        held_by(packed).taken |= wanted == "tiles"
        return wanted
    held = held_by(packed)
    way = held.ways[batch] = _fastest(x.device, packed, held, batch, run)
    whole = _whole(packed)
    for holder in (held, held_by(whole[0])) if whole else (held,):
        holder.taken = holder.taken or way == "tiles"
        if not holder.taken:
            holder.tiles = None
    return way


def _fastest(device: torch.device, packed: Packed, held: Held, batch: int, run, refused: bool = False) -> str:
    refused = held.tiles is None and (refused or held.refused)
    # What was measured holds in a capture too, unless it is tiles that the weight does not have.
    missing = held.tiles is None and torch.cuda.is_current_stream_capturing()
    names = ("window", "unpack") if refused else WAYS
    key = (batch, *held.key, "without tiles") if refused else (batch, *held.key)
    chosen = measured.fastest(
        "sparse_linear",
        key,
        {name: _timed(packed, name, run) for name in names},
        device,
        table(device, batch, not (refused or missing)),
    )
    if chosen == "tiles" and (missing or tiles_of(packed) is None):
        held.refused = not missing
        return _fastest(device, packed, held, batch, run, refused=True)
    return chosen


def _timed(packed: Packed, name: str, run):
    def product():
        if name == "tiles" and tiles_of(packed) is None:
            raise RuntimeError("no memory for tiles")
        return run(name)

    return product


def table(device: torch.device, batch: int, possible: bool) -> str:
    """Where nothing may be timed, by predictions from counted instructions and bytes, not by measurements: tiles are
    the fastest where bulk copies bring them. The window kernel reads each weight once for up to 4 rows of x, which
    sit in registers; for more its instructions take longer than a dense product reads the unpacked weight."""
    if possible and _major(device) >= TILES_MAJOR:
        return "tiles"
    return "window" if batch <= WINDOW_ROWS else "unpack"


@cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def batch_of(rows: int) -> int:
    """The next of ``BATCHES``."""
    for batch in BATCHES[:-1]:
        if rows <= batch:
            return batch
    return BATCHES[-1]


def held_by(packed: Packed) -> Held:
    held = getattr(packed, "_held", None)
    if held is None:
        rows, columns = packed.shape
        kind = f"{packed.keep_n}:{packed.m}" if isinstance(packed, PackedNM) else "bitmask"
        percent = 10 * round(10 * packed.values.numel() / (rows * columns))
        held = Held((f"{rows}x{columns}", kind, f"{percent} % kept", str(packed.dtype).removeprefix("torch.")))
        object.__setattr__(packed, "_held", held)
    return held


def tiles_of(packed: Packed) -> Tiles | None:
    """The weight's tiles, made if there are none; None where the device has no memory for them."""
    held = held_by(packed)
    if held.tiles is not None:
        return held.tiles
    if whole := _whole(packed):
        of_whole = tiles_of(whole[0])
        held.tiles = None if of_whole is None else tiles.rows_of(of_whole, whole[1], packed.shape[0])
        return held.tiles
    with capturing:
        # Another thread may have made tiles, and a graph may hold them.
        if held.tiles is None and has_room(packed):
            held.tiles = _make(packed)
        return held.tiles


def _whole(packed: Packed) -> tuple[Packed, int] | None:
    """The weight whose tiles have this one's rows, and from which row on."""
    whole = whole_of(packed)
    return whole if whole is not None and whole[1] % tiles.ROWS == 0 else None


def has_room(packed: Packed) -> bool:
    """Whether tiles leave ``FREE`` of the device's memory free, with what torch's allocator has in store."""
    _, total = torch.cuda.mem_get_info(packed.device)
    return free_bytes(packed.device) - tiles.bytes_of(packed) >= FREE * total


def _make(packed: Packed) -> Tiles | None:
    try:
        # Tensors of inference mode could not be read outside by what records gradients.
        with torch.inference_mode(False), torch.no_grad():
            return tiles.make(packed)
    except torch.OutOfMemoryError:
        return None


def _make_forced(packed: Packed) -> None:
    if held_by(packed).tiles is None and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("LOSA_SPARSE_LINEAR=tiles: a capture makes no tiles; run the product once before it")
    if tiles_of(packed) is None:
        raise RuntimeError(
            f"LOSA_SPARSE_LINEAR=tiles: {tiles.bytes_of(packed)} bytes for the tiles of a weight {packed.shape} would "
            f"leave less than {FREE:.0%} of the device's memory free"
        )


def _in_graph(packed: Packed, wanted: str, batch: int) -> str:
    """What eager calls have chosen; a graph that is compiled before them makes no tiles."""
    held = getattr(packed, "_held", None)
    way = wanted
    if wanted == "auto":
        way = "window" if batch <= WINDOW_ROWS else "unpack"
        if held is not None and batch in held.ways:
            way = held.ways[batch]
    if way == "tiles" and (held is None or held.tiles is None):
        way = "window"
    return way
