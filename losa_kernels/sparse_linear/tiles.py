"""Weights in tiles: the layout that the tiles kernel of a GPU reads (TILES.md), made from packed weights.

:func:`pack` and :func:`unpack` say in plain PyTorch what the layout is; :func:`make` and :func:`multiply` are
csrc/cuda/sparse_linear/tiles.cu.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from losa_kernels import native
from losa_kernels.bitmask import unpack_mask
from losa_kernels.packing import Packed, PackedBitmask, PackedNM
from losa_kernels.tensors import as_bits

ROWS, COLUMNS, CHUNK = 16, 64, 4  # of a tile; tiles of a chunk
UNIT = 16  # bytes
MOST_ROWS = 16  # of x, for the kernel
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight ``shape`` (out, in) of ``dtype`` in tiles: ``data`` uint8 (bytes,), ``offsets`` int64 (chunks + 1,), and
    ``largest``, the bytes of its largest chunk."""

    data: Tensor
    offsets: Tensor
    largest: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.data.numel() + 8 * self.offsets.numel()


def supported(packed: Packed) -> bool:
    """Whether there can be tiles of this weight."""
    known = isinstance(packed, (PackedBitmask, PackedNM)) and packed.dtype in DTYPES
    return known and packed.shape[0] > 0 and 0 < packed.shape[1] < 1 << 30


def bytes_of(packed: Packed) -> int:
    """At most so many bytes do the tiles of this weight take."""
    rows, columns = packed.shape
    tiles = -(-rows // ROWS) * -(-columns // COLUMNS)
    return tiles * (ROWS * COLUMNS // 8 + UNIT + 8) + 2 * packed.values.numel()


def make(packed: Packed) -> Tiles:
    """The tiles of a :func:`supported` weight that lies on a GPU. The host waits for them."""
    assert isinstance(packed, PackedBitmask | PackedNM)
    offsets = packed.row_offsets if isinstance(packed, PackedBitmask) else None
    columns = packed.shape[1]
    sizes = torch.ops.losa.count_tiles.default(packed.bitmask, columns)
    places = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    total, largest = torch.stack([places[-1], sizes.max()]).tolist()
    data = torch.empty(UNIT * total, dtype=torch.uint8, device=packed.device)
    torch.ops.losa.write_tiles.default(packed.values, packed.bitmask, offsets, columns, places, data)
    # The kernel that multiplies reads weights before the kernels before it are complete.
    torch.cuda.synchronize(packed.device)
    return Tiles(data, places, UNIT * largest, packed.shape, packed.dtype)


def rows_of(whole: Tiles, start: int, rows: int) -> Tiles:
    """The tiles of ``rows`` rows from ``start``, a multiple of 16, on; they share the memory of the whole."""
    chunks = -(-whole.shape[1] // (CHUNK * COLUMNS))
    first, last = start // ROWS * chunks, -(-(start + rows) // ROWS) * chunks
    return replace(whole, offsets=whole.offsets[first : last + 1], shape=(rows, whole.shape[1]))


def multiply(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    """x (..., in) of the tiles' dtype, at most 16 rows -> (..., out)."""
    return torch.ops.losa.sparse_linear_tiles.default(x, tiles.data, tiles.offsets, tiles.shape[0], tiles.largest, bias)


def unpack_on_device(tiles: Tiles) -> Tensor:
    """The dense weight (out, in), from tiles that lie on a GPU."""
    dense = torch.empty(tiles.shape, dtype=tiles.dtype, device=tiles.data.device)
    torch.ops.losa.unpack_tiles.default(tiles.data, tiles.offsets, dense)
    return dense


def pack(packed: Packed) -> Tiles:
    """The tiles of a supported weight, in plain PyTorch."""
    kept, bits = unpack_mask(packed.mask(), packed.shape[1]), as_bits(packed.unpack())
    kept, bits = _tiled(kept), _tiled(bits)  # (groups, tiles, nibble, lane, 4)
    weights = 1 << torch.arange(32).reshape(8, 1, 4)
    words = (kept * weights).sum((2, 4)).to(torch.uint32)  # (groups, tiles, lane)
    chunks, offsets = [], [0]
    for of_group, kept_of_group, bits_of_group in zip(words, kept, bits, strict=True):
        for first in range(0, len(of_group), CHUNK):
            part = slice(first, first + CHUNK)
            values = bits_of_group[part][kept_of_group[part]]
            parts = [of_group[part].reshape(-1).view(torch.uint8), values.view(torch.uint8)]
            length = sum(map(len, parts))
            chunks += [*parts, torch.zeros(-length % UNIT, dtype=torch.uint8)]
            offsets.append(offsets[-1] + -(-length // UNIT))
    places = torch.tensor(offsets)
    return Tiles(torch.cat(chunks), places, UNIT * int(places.diff().max()), packed.shape, packed.dtype)


def unpack(tiles: Tiles) -> Tensor:
    """The dense weight (out, in) of tiles in the host's memory, in plain PyTorch."""
    rows, columns = tiles.shape
    across = -(-columns // COLUMNS)
    chunks = -(-across // CHUNK)
    dense = torch.zeros(-(-rows // ROWS), across, 8, 32, 4, dtype=torch.int16)
    for index, begin in enumerate(tiles.offsets[:-1].tolist()):
        first = index % chunks * CHUNK
        part = dense[index // chunks, first : first + CHUNK]
        head = 128 * len(part)
        chunk = tiles.data[UNIT * begin : UNIT * int(tiles.offsets[index + 1])]
        words = chunk[:head].view(torch.int32).reshape(len(part), 1, 32, 1)
        kept = (words >> torch.arange(32, dtype=torch.int32).reshape(8, 1, 4)) & 1 != 0
        part[kept] = chunk[head : head + 2 * int(kept.sum())].view(torch.int16)
    row, column = _places()
    whole = torch.zeros(len(dense), across, ROWS, COLUMNS, dtype=torch.int16)
    whole[:, :, row, column] = dense
    whole = whole.transpose(1, 2).reshape(ROWS * len(dense), COLUMNS * across)
    return whole[:rows, :columns].contiguous().view(tiles.dtype)


def _places() -> tuple[Tensor, Tensor]:
    """(row, column) in a tile, each (nibble, lane, 4)."""
    nibble, lane, place = torch.meshgrid(torch.arange(8), torch.arange(32), torch.arange(4), indexing="ij")
    row = lane // 4 + 8 * (nibble // 2 % 2)
    return row, 32 * (nibble // 4) + 8 * (lane % 4) + 4 * (nibble % 2) + place


def _tiled(matrix: Tensor) -> Tensor:
    """(out, in) -> (groups, tiles, nibble, lane, 4), zeros beyond the matrix."""
    rows, columns = matrix.shape
    padded = matrix.new_zeros(rows + -rows % ROWS, columns + -columns % COLUMNS)
    padded[:rows, :columns] = matrix
    row, column = _places()
    return padded.reshape(-1, ROWS, padded.shape[1] // COLUMNS, COLUMNS).transpose(1, 2)[:, :, row, column]


if native.missing("cpu") is None:

    @torch.library.register_fake("losa::count_tiles")
    def _(bitmask, columns):
        chunks = -(-bitmask.shape[0] // ROWS) * -(-columns // (CHUNK * COLUMNS))
        return bitmask.new_empty(chunks, dtype=torch.int64)

    @torch.library.register_fake("losa::write_tiles")
    def _(values, bitmask, row_offsets, columns, offsets, data):
        return None

    @torch.library.register_fake("losa::unpack_tiles")
    def _(data, offsets, dense):
        return None

    @torch.library.register_fake("losa::sparse_linear_tiles")
    def _(x, data, offsets, rows, largest, bias):
        return x.new_empty(*x.shape[:-1], rows)
