"""Packed linears in place of a merged model's dense linears, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from losa.errors import ModelError
from losa.inference.waiting_decoders import forget_decoder
from losa.model.blocks import find_blocks, find_linears
from losa.model.forms import Place, holder_of, places
from losa.model.grouping import group_linears
from losa.model.probing import read_directly
from losa.model.replacing import as_linears, unpacked_as_they_were
from losa.model.saving import guard_saving
from losa.modules.linear_experts import stack_of, stand_for
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear, unpack_linears
from losa.packed.formats import AUTO
from losa.packed.weights import FORMATS, MIN_SPARSITY, pack_weight, zero_share

logger = logging.getLogger("losa")


@torch.no_grad()
def sparsify(model: nn.Module, format: str = AUTO, min_sparsity: float = MIN_SPARSITY) -> nn.Module:
    """Replace the block linears of a merged model by packed ones, in place and one after the other, so that dense
    weights are freed on the way.

    The model runs on a few tokens first, to find linears whose weight it reads itself: they stay dense.
    ``save_pretrained`` writes the model dense afterwards, linears of another form (``losa.model.forms``) as they were.

    Args:
        model: decoder with plain linears (``merge_model`` first).
        format: see ``losa.packed.weights.pack_weight``.
        min_sparsity: linears with a smaller share of zeros stay dense, and so do linears that the format cannot hold;
            experts that are stacked in one tensor count as one.

    Returns:
        the model, for inference only.

    Raises:
        ModelError: the model has adapters, no linear has enough zeros, the format can hold none that has, or it is not
            made for one of them: those before it are packed then.
    """
    blocks, considered = find_blocks(model), 0
    for name, linear in blocks.linears().items():  # check all linears before any is replaced
        if isinstance(linear, MaskedLoRALinear):
            raise ModelError(f"sparsify: {name} is a {type(linear).__name__}; merge_model first")
        considered += 1
        del linear  # it would keep dense weights
    forget_decoder(model)
    try:
        leave = read_directly(model)
    except ModelError as error:
        logger.info("sparsify: %s", error)
        leave = set()
    guard_saving(model)  # whatever happens from here on, what is saved is a checkpoint
    packer = _Packer(format, min_sparsity, leave)
    for block_name, block in zip(blocks.names, blocks, strict=True):
        own, forms = _names(block)
        for name in own:
            packer.linear(block, name, block_name)
        for name in forms:
            packer.form(block, name)
        group_linears(block)
    if packer.unfit and not packer.replaced:
        told = f"the format {format} needs {FORMATS[format].needs}"
        raise ModelError(
            f"sparsify: {told}; {packer.unfit} of {considered} linears have zeros enough, but not like that"
        )
    if not considered:
        raise ModelError("sparsify: the model's blocks have no linear that can be packed")
    if not packer.replaced:
        raise ModelError(f"sparsify: none of {considered} linears has {min_sparsity:.0%} zeros; is the model pruned?")
    logger.info("sparsify: %d of %d linears packed", packer.replaced, considered)
    return model


def _names(block: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a block's linears, and of the modules of other forms that hold linears."""
    linears = find_linears(block)
    own = [name for name, linear in linears.items() if holder_of(linear) is linear]
    holders = {holder_of(linear) for linear in linears.values()}
    return own, [name for name, module in block.named_modules() if module in holders and name not in own]


@dataclass
class _Packer:
    """Packs linears one by one; counts those that it has replaced, and those that the format cannot hold."""

    format: str
    min_sparsity: float
    leave: Set[str]
    replaced: int = 0
    unfit: int = 0

    def linear(self, block: nn.Module, name: str, block_name: str) -> None:
        linear: Any = block.get_submodule(name)
        if f"{block_name}.{name}" not in self.leave and zero_share(linear.weight) >= self.min_sparsity:
            self._replace(block, name, linear)

    def form(self, block: nn.Module, name: str) -> None:
        """A module of another form: the linears of its tensors that have zeros enough. It stays as it is where none
        is packed."""
        module: Any = block.get_submodule(name)
        chosen = [
            f"{name}.{part.removesuffix('weight')}".rstrip(".")
            for parameter, parts in places(module).items()
            for part in parts
            if part.endswith("weight") and _zero_share(module.get_parameter(parameter), parts) >= self.min_sparsity
        ]
        del module
        if not chosen or as_linears(block, [name]):
            return
        before = self.replaced
        try:
            for linear in chosen:
                self._replace(block, linear, block.get_submodule(linear))
        finally:
            if self.replaced == before:
                unpacked_as_they_were(block)

    def _replace(self, block: nn.Module, name: str, linear: Any) -> None:
        try:
            packed = pack_weight(linear.weight.detach(), self.format)
        except ValueError as error:
            raise ModelError(f"sparsify: {name}: {error}") from error
        if packed is None:
            self.unfit += 1
            return
        sparse = SparseLinear(packed, linear.bias).train(linear.training)
        block.set_submodule(name, stand_for(sparse, stack_of(linear)))
        self.replaced += 1


def _zero_share(tensor: torch.Tensor, parts: Mapping[str, Place]) -> float:
    """Of the weights in a tensor, those that are zero; rows that no linear has do not count."""
    kept = sum(int(torch.count_nonzero(place.of(tensor))) for place in parts.values())
    return 1 - kept / sum(prod(place.shape) for place in parts.values())


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """The inverse of ``sparsify``, in place; rows of a stack that nothing reads are zeros."""
    forget_decoder(model)
    unpack_linears(model)
    unpacked_as_they_were(model)
    return model
