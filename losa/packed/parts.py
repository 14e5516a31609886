"""A checkpoint block by block: the parts in which it is packed, and in which a packed directory is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from losa.errors import ModelError
from losa.model.finite import rounded
from losa.model.forms import holder_of
from losa.model.naming import Naming, check_names
from losa.model.skeleton import skeleton
from losa.packed.weights import Packer, zero_share
from losa.storage.tensor_files import Stored, TensorFiles, checkpoint_tensors
from losa_kernels.packing import Packed


@dataclass
class PackedPart:
    """The tensors of one block, packed; or all tensors that belong to no block.

    block: the block's index, or None.
    linears: packed weights by the linear's name on disk.
    dense: all other tensors by their names on disk.
    left: names on disk of the linears that were not packed.
    modules: names in the model of the packed linears.
    source_bytes: of the tensors that this part was made from.
    """

    block: int | None
    linears: dict[str, Packed]
    dense: dict[str, Tensor]
    left: list[str]
    modules: set[str]
    source_bytes: int


class Contents(NamedTuple):
    """A packed directory that is open for reading.

    where: the file or directory that lists its tensors.
    packed: names on disk of the packed linears.
    stored: type and shape of each tensor of the dense checkpoint that was packed.
    parts: one block's tensors after the other's: packed weights by linear, and other tensors, by their names on disk.
    """

    where: Path
    packed: Set[str]
    stored: dict[str, Stored]
    parts: Iterator[dict[str, Packed | Tensor]]


def packed_parts(
    source: Path,
    pack: Packer,
    dtype: torch.dtype | None,
    min_sparsity: float,
    leave: Set[str] = frozenset(),
    needs: str = "",
) -> Iterator[PackedPart]:
    """The dense checkpoint in ``source``, packed; one block's weights in memory at a time.

    Tensors and linears keep their names on disk. Experts are packed where each one's matrices are tensors of their own;
    other weights that transformers makes from several stored tensors (split projections) stay as they are stored.

    Args:
        pack: a linear's weight -> packed, or None to leave it dense.
        dtype: floating-point tensors are rounded to it first; None keeps the type of each tensor.
        min_sparsity: linears with a smaller share of zeros are left dense.
        leave: names in the model of linears to leave dense.
        needs: what ``pack`` requires of a weight, for messages.

    Raises:
        ModelError: no Hugging Face directory of safetensors; tensors that do not belong to the model; one that is not
            finite; or (at the end) no linear was packed.
    """
    naming = check_names(source, skeleton(source))
    held = {name for name, linear in naming.blocks.linears().items() if holder_of(linear) is linear}
    linears = held | set(naming.experts.values())

    def parts() -> Iterator[PackedPart]:
        done, left, unfit = 0, 0, []
        with checkpoint_tensors(source) as files:
            for block, names in by_block(naming, files.names):
                part = PackedPart(block, {}, {}, [], set(), 0)
                for name in names:
                    tensor = _read(source, files, name, dtype, parameter=name not in naming.unused)
                    part.source_bytes += tensor.nbytes
                    module, linear = naming.linear_of(name), name.removesuffix(".weight")
                    if module is not None and module in linears:
                        packed = None
                        if module not in leave and zero_share(tensor) >= min_sparsity:
                            packed = _packed(pack, tensor, f"{source}: {linear}")
                            unfit += [] if packed is not None else [linear]
                        if packed is not None:
                            part.linears[linear] = packed
                            part.modules.add(module)
                            continue
                        part.left.append(linear)
                    part.dense[name] = tensor
                done, left = done + len(part.linears), left + len(part.left)
                yield part
        if not done:
            raise ModelError(f"{source}: {_nothing_packed(naming, linears, left, unfit, min_sparsity, needs)}")

    return parts()


def _packed(pack: Packer, weight: Tensor, where: str) -> Packed | None:
    try:
        return pack(weight)
    except ValueError as error:
        raise ModelError(f"{where}: {error}; the format auto packs any width") from error


def _nothing_packed(
    naming: Naming, linears: Set[str], left: int, unfit: list[str], min_sparsity: float, needs: str
) -> str:
    if unfit:
        others = f" and {len(unfit) - 1} others" if len(unfit) > 1 else ""
        return f"the format needs {needs}; {unfit[0]}{others} of {left} linears have zeros enough, but not like that"
    if left:
        return f"none of {left} linears has {min_sparsity:.0%} zeros; is it pruned?"
    if linears:
        made = f"; transformers makes them from other tensors, such as {next(iter(naming.made))}" if naming.made else ""
        return f"none of the model's {len(linears)} linears is stored as a tensor of its own{made}"
    return "the model's blocks have no linear that can be packed"


def _read(source: Path, files: TensorFiles, name: str, dtype: torch.dtype | None, parameter: bool) -> Tensor:
    tensor = files.get(name)
    if parameter:
        return rounded(f"{source}: {name}", tensor, dtype)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def by_block(naming: Naming, names: Iterable[str]) -> Iterator[tuple[int | None, list[str]]]:
    """(block, names on disk of its tensors), blocks in order; tensors that belong to no block come last, with None."""
    blocks, targets = naming.blocks, naming.targets()
    groups: dict[int | None, list[str]] = {**{i: [] for i in range(len(blocks))}, None: []}
    for name in names:
        index = blocks.index_of(targets[name])
        groups[index if index in groups else None].append(name)
    yield from ((index, found) for index, found in groups.items() if found)
