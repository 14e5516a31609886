"""A checkpoint block by block: the parts in which it is packed, and in which a packed directory is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from losa.errors import ModelError
from losa.model.finite import rounded
from losa.model.forms import Place, holder_of
from losa.model.naming import Naming, check_names
from losa.model.replacing import computes_its_linears
from losa.model.skeleton import skeleton
from losa.packed.stacks import Stack, split
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
    stacks: by name on disk, tensors whose weights are among ``linears``.
    """

    block: int | None
    linears: dict[str, Packed]
    dense: dict[str, Tensor]
    left: list[str]
    modules: set[str]
    source_bytes: int
    stacks: dict[str, Stack] = field(default_factory=dict)


class Contents(NamedTuple):
    """A packed directory that is open for reading.

    where: the file or directory that lists its tensors.
    packed: names on disk of the packed linears.
    stored: type and shape of each tensor of the dense checkpoint that was packed.
    parts: one block's tensors after the other's: packed weights by linear, and other tensors, by their names on disk.
    stacks: tensors of the dense checkpoint that hold packed weights, by their names on disk.
    """

    where: Path
    packed: Set[str]
    stored: dict[str, Stored]
    parts: Iterator[dict[str, Packed | Tensor]]
    stacks: Mapping[str, Stack] = {}


def packed_parts(
    source: Path,
    pack: Packer,
    dtype: torch.dtype | None,
    min_sparsity: float,
    leave: Set[str] = frozenset(),
    needs: str = "",
    stacks: bool = True,
) -> Iterator[PackedPart]:
    """The dense checkpoint in ``source``, packed; one block's weights in memory at a time.

    Tensors and linears keep their names on disk. Weights that transformers makes from several stored tensors (split
    projections) stay as they are stored, but for experts whose matrices are tensors of their own. A linear that is part
    of a stored tensor, or is stored transposed, is named by its place in the module that holds it.

    Args:
        pack: a linear's weight -> packed, or None to leave it dense.
        dtype: floating-point tensors are rounded to it first; None keeps the type of each tensor.
        min_sparsity: linears with a smaller share of zeros are left dense; what is one tensor on disk counts as one.
        leave: names in the model of linears to leave dense.
        needs: what ``pack`` requires of a weight, for messages.
        stacks: whether to pack linears that are no stored tensors of their own.

    Raises:
        ModelError: no Hugging Face directory of safetensors; tensors that do not belong to the model; one that is not
            finite; or (at the end) no linear was packed.
    """
    naming = check_names(source, skeleton(source))
    every = naming.blocks.linears()
    held = {name for name, linear in every.items() if holder_of(linear) is linear}
    linears = held | set(naming.experts.values())
    inside = {name: own for name in naming.parts if (own := _weights_in(naming, name, every.keys()))}

    def parts() -> Iterator[PackedPart]:
        done, left, unfit = 0, 0, []
        with checkpoint_tensors(source) as files:
            for block, names in by_block(naming, files.names):
                part = PackedPart(block, {}, {}, [], set(), 0)
                for name in names:
                    tensor = _read(source, files, name, dtype, parameter=name not in naming.unused)
                    part.source_bytes += tensor.nbytes
                    own = inside.get(name) or _as_it_is(naming, name, tensor, linears)
                    if own:
                        places = {_on_disk(naming, name, linear): place for linear, place in own.items()}
                        wanted = stacks or name not in inside
                        fits = wanted and leave.isdisjoint(own) and zero_share(tensor) >= min_sparsity
                        where = f"{source}: {name.removesuffix('.weight')}"
                        packed = _split(pack, tensor, places, where) if fits else None
                        if packed is not None:
                            part.linears |= packed
                            part.modules |= own.keys()
                            if name in inside:
                                part.stacks[name] = Stack(tuple(tensor.shape), places)
                            continue
                        unfit += [*places] if fits else []
                        part.left += [*places]
                    part.dense[name] = tensor
                done, left = done + len(part.linears), left + len(part.left)
                yield part
        if not done:
            every_one = linears.union(*inside.values())
            raise ModelError(f"{source}: {_nothing_packed(naming, every_one, left, unfit, min_sparsity, needs)}")

    return parts()


def _weights_in(naming: Naming, name: str, linears: Set[str]) -> dict[str, Place]:
    """The linears whose weights lie in a stored tensor, by name in the model; none where it holds anything else:
    biases, what is not pruned, rows that no linear has, or weights of a stack that computes something else."""
    found = {part.removesuffix(".weight"): p for part, p in naming.parts[name].items() if part.endswith(".weight")}
    if not found or not found.keys() <= linears:
        return {}
    target = naming.renamed[name]
    if sum(prod(place.shape) for place in found.values()) != naming.expected[target].numel():
        return {}
    holder = naming.holder(target)
    assert holder is not None, "what has linears inside is of another form"
    return found if computes_its_linears(naming.model.get_submodule(holder)) else {}


def _as_it_is(naming: Naming, name: str, tensor: Tensor, linears: Set[str]) -> dict[str, Place]:
    """The linear whose weight a stored tensor is, by name in the model, and all of the tensor; none where it is no
    weight of ``linears``."""
    linear = naming.linear_of(name)
    if linear is None or linear not in linears:
        return {}
    rows, columns = tensor.shape
    return {linear: Place((rows, columns), (columns, 1), 0)}


def _on_disk(naming: Naming, name: str, linear: str) -> str:
    """What a linear is called on disk whose weight is, or lies in, the stored tensor ``name``."""
    if name not in naming.parts:
        return name.removesuffix(".weight")
    target = naming.renamed[name]
    holder = naming.holder(target)
    assert holder is not None, "what has linears inside is of another form"
    within = target.removeprefix(holder).count(".")
    return f"{name.rsplit('.', within)[0]}{linear.removeprefix(holder)}"


def _split(pack: Packer, tensor: Tensor, places: dict[str, Place], where: str) -> dict[str, Packed] | None:
    try:
        return split(tensor, places, pack)
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
