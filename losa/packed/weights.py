"""One weight without its zeros: a registry of formats, and the choice of the format that suits a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import get_type_hints

import torch
from torch import Tensor

from losa.errors import shown
from losa.packed.formats import AUTO, NOTES, own_names
from losa.registry import Registry
from losa.storage.kinds import BITMASK, BITMASK_24, COMPRESSED
from losa_kernels import pack_bitmask, pack_mask, pack_nm
from losa_kernels.packing import Packed, Packed24, PackedBitmask, PackedNM

# Below this share of zeros packing saves too little to pay for the decoding; a quarter (3:4) still pays.
MIN_SPARSITY = 0.2
# N:M with more than this share of padding in its values is stored as a bitmask.
MAX_PADDING = 0.02

# Tensors of a linear that is stored dense, or beside its packed weight.
_OF_LINEARS = {"weight", "bias"}

# weight (out, in) -> the weight packed; None: the format cannot hold it, and it stays dense.
Packer = Callable[[Tensor], Packed | None]
# (out, in) and the numbers of a manifest's entry by name: raises ValueError if they do not go together.
NumbersCheck = Callable[[tuple[int, int], Mapping[str, object]], None]


def _whole_numbers(shape: tuple[int, int], numbers: Mapping[str, object]) -> None:
    for name, value in numbers.items():
        if type(value) is not int:
            raise ValueError(f"{name}: expected a whole number, got {shown(value)}")


def _only_read(weight: Tensor) -> None:
    raise ValueError("format: weights can be read in this format, not packed")


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    Attributes:
        name: of ``pack_weight(format=...)`` and ``losa pack --format``, and in the manifest of a packed directory.
        kind: the class of the packed weights. Its fields are ``shape``, tensors, which are stored in files, and whole
            numbers, which stand in the manifest.
        pack: packs a weight; raises ValueError for a weight that the format is not made for. Default: the format is
            read, and nothing is packed to it.
        needs: what ``pack`` asks of a weight, for messages where it gave None for every weight.
        check_numbers: reads the numbers of a manifest's entry before any tensor is read.
    """

    name: str
    kind: type[Packed]
    pack: Packer = _only_read
    needs: str = "another pattern of zeros"
    check_numbers: NumbersCheck = _whole_numbers

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors, sorted."""
        hints = get_type_hints(self.kind)
        return tuple(sorted(f.name for f in fields(self.kind) if hints[f.name] is Tensor))

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """Names of the numbers, in the order of the class's fields."""
        return tuple(f.name for f in fields(self.kind) if f.name != "shape" and f.name not in self.tensors)


# Formats of directories as losa writes them, by name.
FORMATS: Registry[Format] = Registry("format")


def register_format(format: Format, note: str = "") -> None:
    """Add a format: the command packs to it, directories are read and written with it, models run on it.

    Args:
        note: a few words for the command's help.

    Raises:
        ValueError: the name or the class belongs to another format, or a field is called like a tensor of a linear.
    """
    if format.name in (AUTO, *COMPRESSED):
        raise ValueError(f"format {format.name!r}: the name has a meaning already")
    if taken := sorted(_OF_LINEARS & {field.name for field in fields(format.kind)}):
        raise ValueError(f"format {format.name!r}: {taken[0]}: expected a name that no tensor of a linear has")
    for name in FORMATS:
        if name != format.name and FORMATS[name].kind is format.kind:
            raise ValueError(f"format {format.name!r}: {format.kind.__name__} belongs to the format {name!r}")
    FORMATS.register(format.name, format)
    if format.pack is not _only_read:
        NOTES.register(format.name, note)


def format_of(packed: Packed) -> Format:
    """The registered format of a packed weight. Raises ValueError if there is none."""
    for name in FORMATS:
        if type(packed) is FORMATS[name].kind:
            return FORMATS[name]
    raise ValueError(f"packed: {type(packed).__name__} is of no registered format")


def pack_weight(weight: Tensor, format: str = AUTO) -> Packed | None:
    """Pack what is not zero. Zeros of either sign are dropped and come back as +0.0: models that were pruned by a
    product with a mask are full of -0.0.

    Args:
        weight: (out, in) floating point.
        format: "bitmask"; "nm": the smallest N of every 8 (or of every 4) that holds the weight; "auto": N:M where it
            wastes nearly nothing, else a bitmask; or a registered name.

    Returns:
        the packed weight; None where a registered format cannot hold it.

    Raises:
        ValueError: an unknown format, or "nm" for a width that is no multiple of 4.
    """
    if format == AUTO:
        return _pack_auto(weight)
    if format not in own_names():
        raise ValueError(f"format: expected one of {', '.join(own_names())}, got {format!r}")
    return FORMATS[format].pack(weight)


def zero_share(weight: Tensor) -> float:
    """Share of zeros, 0..1."""
    return 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())


def _pack_auto(weight: Tensor) -> Packed:
    kept = weight != 0
    pattern = _pattern(kept)
    if pattern is not None:
        keep_n, m = pattern
        stored = keep_n / m * kept.numel()
        if stored > 0 and stored - int(kept.sum()) <= MAX_PADDING * stored:
            return pack_nm(weight, pack_mask(kept), keep_n, m)
    return pack_bitmask(weight, pack_mask(kept))


def _pack_bitmask(weight: Tensor) -> PackedBitmask:
    return pack_bitmask(weight, pack_mask(weight != 0))


def _pack_nm(weight: Tensor) -> PackedNM:
    kept = weight != 0
    pattern = _pattern(kept)
    if pattern is None:
        raise ValueError(f"format: nm needs a width that is a multiple of 4, got {weight.shape[1]}")
    return pack_nm(weight, pack_mask(kept), *pattern)


def _pack_24(weight: Tensor) -> PackedNM | None:
    kept = weight != 0
    if weight.shape[1] % 4 or int(kept.reshape(-1, 4).sum(1).max()) > 2:
        return None
    return pack_nm(weight, pack_mask(kept), 2, 4)


def _pattern(kept: Tensor) -> tuple[int, int] | None:
    """The densest group decides: (keep_n, m) with the fewest stored values, 4 before 8 where they are equal."""
    found = []
    for m in (4, 8):
        if kept.numel() and kept.shape[1] % m == 0:
            keep_n = max(1, int(kept.reshape(-1, m).sum(1, dtype=torch.int32).max()))
            found.append((keep_n, m))
    return min(found, key=lambda pattern: pattern[0] / pattern[1], default=None)


def _check_pattern(shape: tuple[int, int], numbers: Mapping[str, object]) -> None:
    keep_n, m = numbers["keep_n"], numbers["m"]
    if type(m) is int and type(keep_n) is int and 0 < keep_n <= m <= shape[1] and shape[1] % m == 0:
        return
    told = f"keep_n {shown(keep_n)} and m {shown(m)}"
    raise ValueError(f"expected keep_n of every m, a divisor of the width {shape[1]}, got {told}")


register_format(Format("bitmask", PackedBitmask, _pack_bitmask), NOTES["bitmask"])
register_format(Format("nm", PackedNM, _pack_nm, check_numbers=_check_pattern), NOTES["nm"])
register_format(Format("24", Packed24))

# Formats of directories as compressed-tensors writes them, by the name that config.json states.
COMPRESSED_FORMATS = {
    BITMASK: Format(BITMASK, PackedBitmask, _pack_bitmask),
    BITMASK_24: Format(
        BITMASK_24, PackedNM, _pack_24, needs="2:4 weights (at most 2 of every 4 in a row are not zero)"
    ),
}
