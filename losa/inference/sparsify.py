"""Packed linears in place of a merged model's dense linears, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from losa.errors import ModelError
from losa.inference.waiting_decoders import forget_decoder
from losa.model.blocks import find_blocks, find_linears
from losa.model.forms import as_linears, holder_of, unpacked_as_they_were
from losa.model.grouping import group_linears
from losa.model.probing import read_directly
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
        min_sparsity: linears with a smaller share of zeros stay dense, and so do linears that the format cannot hold.

    Returns:
        the model, for inference only.

    Raises:
        ModelError: the model has adapters, no linear has enough zeros, or the format can hold none that has.
    """
    found = find_blocks(model)
    blocks = [(name, block, find_linears(block)) for name, block in zip(found.names, found, strict=True)]
    for _, _, linears in blocks:  # check all linears before any is replaced
        for name, layer in linears.items():
            if isinstance(layer, MaskedLoRALinear):
                raise ModelError(f"sparsify: {name} is a {type(layer).__name__}; merge_model first")
    forget_decoder(model)
    replaced, unfit, considered = 0, 0, sum(len(linears) for _, _, linears in blocks)
    try:
        leave = read_directly(model)
    except ModelError as error:
        logger.info("sparsify: %s", error)
        leave = set()
    for block_name, block, linears in blocks:
        names = [*linears]
        left = _shown(block, linears, min_sparsity)
        del linears  # views of what is to be freed
        for name in names:
            if name in left:
                continue
            linear: Any = block.get_submodule(name)
            if f"{block_name}.{name}" not in leave and zero_share(linear.weight) >= min_sparsity:
                packed = pack_weight(linear.weight.detach(), format)
                if packed is None:
                    unfit += 1
                    continue
                sparse = SparseLinear(packed, linear.bias).train(linear.training)
                block.set_submodule(name, stand_for(sparse, stack_of(linear)))
                replaced += 1
        group_linears(block)
    if unfit and not replaced:
        told = f"the format {format} needs {FORMATS[format].needs}"
        raise ModelError(f"sparsify: {told}; {unfit} of {considered} linears have zeros enough, but not like that")
    if not considered:
        raise ModelError("sparsify: the model's blocks have no linear that can be packed")
    if not replaced:
        raise ModelError(f"sparsify: none of {considered} linears has {min_sparsity:.0%} zeros; is the model pruned?")
    logger.info("sparsify: %d of %d linears packed", replaced, considered)
    guard_saving(model)
    return model


def _shown(block: nn.Module, linears: Mapping[str, nn.Module], min_sparsity: float) -> set[str]:
    """Show linears of other forms as linears, where some of a module's have zeros enough; the names of those that are
    not shown."""
    holders: dict[nn.Module, list[str]] = {}
    for name, linear in linears.items():
        if (holder := holder_of(linear)) is not linear:
            holders.setdefault(holder, []).append(name)
    names = {module: name for name, module in block.named_modules()}
    left = set()
    for holder, parts in holders.items():
        zeros = any(zero_share(cast(nn.Linear, linears[part]).weight) >= min_sparsity for part in parts)
        if not zeros or as_linears(block, [names[holder]]):
            left |= {*parts}
    return left


@torch.no_grad()
def densify(model: nn.Module) -> nn.Module:
    """The inverse of ``sparsify``, in place."""
    forget_decoder(model)
    unpack_linears(model)
    unpacked_as_they_were(model)
    return model
