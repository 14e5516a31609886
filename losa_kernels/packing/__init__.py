"""Sparse storage formats: bitmask, N:M with fixed rows, and 2:4 in CUTLASS's layout. Bytes: see FORMAT.md."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from losa_kernels import arguments
from losa_kernels.bitmask import check_packed, packed_width
from losa_kernels.dispatch import implementation
from losa_kernels.packing import checks, reference

__all__ = ["Packed", "Packed24", "PackedBitmask", "PackedNM", "pack_24", "pack_bitmask", "pack_nm"]


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """What the formats share: ``shape`` (out, in) and ``values``, whose dtype is the weight's.

    Two objects are equal only if they are the same object: tensors have no single answer to ``==``.

    Making one checks what can be told without reading data: types, dtypes, shapes, strides and devices. What comes from
    elsewhere (a file) also needs ``check``: with data that contradict each other, ops give wrong numbers or
    raise ValueError.

    Raises:
        ValueError: names the field, what was expected and what it got.
    """

    shape: tuple[int, int]
    values: Tensor

    def __post_init__(self):
        # A compiled graph makes objects from checked ones only, and has sizes that are not known yet.
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "shape", checks.shape(self.shape))
            self._check_fields()

    def __getstate__(self) -> dict:
        """The fields alone: what kernels hang on an object (tiles of a GPU) goes into no file and no copy."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def check(self) -> None:
        """Read all but the values and raise ValueError where they contradict each other or the format (FORMAT.md)."""
        if self.values.is_meta:
            raise ValueError("values: expected tensors with data, got tensors on meta")
        self._check_data()

    @abstractmethod
    def _check_fields(self) -> None:
        """Types, dtypes, shapes, strides and devices."""

    @abstractmethod
    def _check_data(self) -> None:
        """What only the data tell."""

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    @abstractmethod
    def unpack(self) -> Tensor:
        """The dense weight (out, in): kept values to the bit, +0.0 elsewhere."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``sparse_linear`` for arguments that it has checked: unpack, then multiply.

        The formats of this package have kernels, and this is their reference. A class from outside may override it with
        an op of its own.
        """
        weight = self.unpack().to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @abstractmethod
    def mask(self) -> Tensor:
        """Packed mask (out, ceil(in/8)) uint8 of stored positions: the weight's mask, and what fills short groups."""


@dataclass(frozen=True, eq=False)
class PackedBitmask(Packed):
    """Kept values row by row, the packed mask (out, ceil(in/8)) uint8, and each row's first value (out,) int64."""

    bitmask: Tensor
    row_offsets: Tensor

    def _check_fields(self) -> None:
        rows, columns = self.shape
        arguments.tensor("values", self.values)
        checks.field("values", self.values, None, (self.values.numel(),))
        if self.values.numel() > rows * columns:
            raise ValueError(f"values: expected at most {rows * columns} of shape {self.shape}, got {len(self.values)}")
        checks.field("bitmask", self.bitmask, torch.uint8, (rows, packed_width(columns)), self.device)
        checks.field("row_offsets", self.row_offsets, torch.int64, (rows,), self.device)

    def _check_data(self) -> None:
        checks.bitmask_data(self.values, self.bitmask, self.row_offsets, self.shape[1])

    def unpack(self) -> Tensor:
        return implementation("unpack_bitmask", self.values)(self.values, self.bitmask, self.row_offsets, self.shape)

    def mask(self) -> Tensor:
        return self.bitmask


@dataclass(frozen=True, eq=False)
class PackedNM(Packed):
    """``keep_n`` values of every ``m``: values (out, in / m * keep_n), and the packed mask of stored positions."""

    bitmask: Tensor
    keep_n: int
    m: int

    def _check_fields(self) -> None:
        rows, columns = self.shape
        keep_n, m = arguments.pattern(self.keep_n, self.m, columns)
        object.__setattr__(self, "keep_n", keep_n)
        object.__setattr__(self, "m", m)
        checks.field("values", self.values, None, (rows, columns // m * keep_n))
        checks.field("bitmask", self.bitmask, torch.uint8, (rows, packed_width(columns)), self.device)

    def _check_data(self) -> None:
        largest = implementation("largest_group", self.bitmask)(self.bitmask, self.shape[1], self.m)
        checks.nm_data(self.bitmask, self.shape[1], self.keep_n, self.m, largest)

    def unpack(self) -> Tensor:
        return implementation("unpack_bitmask", self.values)(self.values, self.bitmask, None, self.shape)

    def mask(self) -> Tensor:
        return self.bitmask


@dataclass(frozen=True, eq=False)
class Packed24(Packed):
    """2:4 of 16-bit weights as torch's SparseSemiStructuredTensorCUTLASS stores it: values (out, in / 2) and ``meta``
    int16 (out, in / 16)."""

    meta: Tensor

    def _check_fields(self) -> None:
        rows, columns = self.shape
        if rows % 32 or columns % 64:
            raise ValueError(f"shape: expected out a multiple of 32 and in of 64, got {self.shape}")
        checks.field("values", self.values, None, (rows, columns // 2))
        if self.values.element_size() != 2:
            raise ValueError(f"values: expected bfloat16 or float16, got {self.values.dtype}")
        checks.field("meta", self.meta, torch.int16, (rows, columns // 16), self.device)

    def _check_data(self) -> None:
        checks.data_24(self.meta)

    def unpack(self) -> Tensor:
        return implementation("unpack_24", self.values)(self.values, self.meta)

    def mask(self) -> Tensor:
        return reference.mask_24(self.meta)


def pack_bitmask(weight: Tensor, mask: Tensor) -> PackedBitmask:
    """Store kept values only, whatever the pattern (compressed-tensors' sparse-bitmask).

    Args:
        weight: (out, in) floating point; values at pruned places are dropped, NaN and inf at kept ones kept to the bit.
        mask: packed uint8 (out, ceil(in/8)), 1 = kept. A kept 0.0 or -0.0 is stored.

    Raises:
        ValueError: a wrong shape or dtype; names the argument.
    """
    _check(weight, mask)
    mask = mask.clone(memory_format=torch.contiguous_format)
    if last := weight.shape[1] % 8:
        mask[:, -1] &= (1 << last) - 1  # a set padding bit would be read as one more value
    values, offsets = implementation("pack_bitmask", weight)(weight.detach(), mask)
    return PackedBitmask((weight.shape[0], weight.shape[1]), values, mask, offsets)


def pack_nm(weight: Tensor, mask: Tensor, keep_n: int, m: int) -> PackedNM:
    """Store exactly ``keep_n`` of every ``m`` weights of a row: rows of fixed length, no offsets.

    A group that keeps fewer weights also stores its first pruned positions, as +0.0; ``mask()`` counts them as kept.
    ``weight`` and ``mask``: see ``pack_bitmask``.

    Raises:
        ValueError: in is no multiple of m, or a group keeps more than keep_n.
    """
    _check(weight, mask)
    keep_n, m = arguments.pattern(keep_n, m, weight.shape[1])
    _check_groups(weight, mask, keep_n, m)
    values, stored = implementation("pack_nm", weight)(weight.detach(), mask, keep_n, m)
    return PackedNM((weight.shape[0], weight.shape[1]), values, stored, keep_n, m)


def pack_24(weight: Tensor, mask: Tensor) -> Packed24:
    """2:4 in the layout that torch's semi-structured (CUTLASS) products read; short groups are filled as in pack_nm.

    Args:
        weight: (out, in) bfloat16 or float16, out a multiple of 32 and in of 64.
        mask: packed uint8 (out, ceil(in/8)), 1 = kept; at most 2 of every 4.

    Raises:
        ValueError: not 16-bit, sides that are no multiples of 32 and 64, or a group of 4 that keeps more than 2.
    """
    _check(weight, mask)
    if weight.element_size() != 2:
        raise ValueError(f"weight: expected bfloat16 or float16, got {weight.dtype}")
    rows, columns = weight.shape
    if rows % 32 or columns % 64:
        raise ValueError(f"weight: expected out a multiple of 32 and in of 64, got {tuple(weight.shape)}")
    _check_groups(weight, mask, 2, 4)
    values, meta = implementation("pack_24", weight)(weight.detach(), mask)
    return Packed24((rows, columns), values, meta)


def _check(weight: Tensor, mask: Tensor) -> None:
    arguments.with_data("weight", arguments.tensor("weight", weight))
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected floating point (out, in), got {weight.dtype} {tuple(weight.shape)}")
    check_packed(mask, weight)


def _check_groups(weight: Tensor, mask: Tensor, keep_n: int, m: int) -> None:
    most = implementation("largest_group", weight)(mask, weight.shape[1], m)
    if most > keep_n:
        raise ValueError(f"mask: expected at most {keep_n} kept of every {m}, got a group with {most}")
