"""A model's block linears replaced by masked-LoRA layers, and back: wrapped, merged, unwrapped."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from losa.distributed.sharding import gathered, shard_module, sharding_of, sum_over_rows
from losa.distributed.watch import progress
from losa.errors import ModelError
from losa.model.blocks import (
    Blocks,
    Targets,
    as_targets,
    find_blocks,
    is_linear,
    linears_of,
    matches,
    parameter_uses,
    stacked_weights,
    weight_count,
)
from losa.model.norms import trained_norms
from losa.model.saving import guard_saving
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear
from losa.modules.trained_norm import TrainedNorm
from losa_kernels import unpack_mask

logger = logging.getLogger("losa")

_Layer = TypeVar("_Layer", bound=MaskedLoRALinear)


def wrap_model(
    model: nn.Module,
    *,
    layer: type[MaskedLoRALinear] = MaskedLoRALinear,
    rank: int,
    scaling: float,
    dropout_p: float = 0.0,
    targets: Targets = None,
    seed: int = 0,
) -> dict[str, MaskedLoRALinear]:
    """Replace the blocks' linears by ``layer``, in place, and freeze everything but the adapters.

    The weights stay where they are in memory; the adapters of a sharded model are sharded too. An adapter is seeded by
    (seed, full name), so another choice of targets does not change it. Stacked expert weights stay dense, with a
    warning. ``save_pretrained`` refuses the model until it is merged or unwrapped.

    Args:
        model: a decoder of transformers.
        layer: ``MaskedLoRALinear`` or a subclass of it.
        rank: of all adapters, 1 to the smaller side of a linear, at most 128.
        scaling: s in W + s B A.
        dropout_p: 0 <= p < 1, on the adapters' inputs in training.
        targets: which linears of each block; None: all (``find_linears``).
        seed: for the Gaussian ``lora_A``.

    Returns:
        the new layers by full name, in model order.

    Raises:
        ModelError: no blocks, already wrapped, a target that matches nothing, or a rank that does not fit a linear.
            Then the model is unchanged.
    """
    if wrapped_linears(model):
        raise ModelError("model: already wrapped; merge_model or unwrap_model first")
    blocks = find_blocks(model)
    uses, wanted = parameter_uses(model), as_targets(targets)
    every = {name: linears_of(block, uses, []) for name, block in zip(blocks.names, blocks, strict=True)}
    names = list(dict.fromkeys(name for linears in every.values() for name in linears))
    for target in wanted:
        if not any(matches(target, name) for name in names):
            raise ModelError(f"targets: {target!r} matches no linear of a block; there are {', '.join(names)}")
    wrapped = {}
    for block_name, linears in every.items():
        for name, linear in linears.items():
            if wanted and not any(matches(target, name) for target in wanted):
                continue
            full = f"{block_name}.{name}"
            generator = torch.Generator().manual_seed(_seed_for(seed, full))
            try:
                new = layer.from_linear(
                    cast(nn.Linear, linear), rank, scaling=scaling, dropout_p=dropout_p, generator=generator
                )
            except ValueError as error:
                raise ModelError(f"{full}: {error}") from error
            if (sharding := sharding_of(linear)) is not None:
                shard_module(new, sharding)
            wrapped[full] = new
    if not wrapped:
        raise ModelError(f"model: every nn.Linear of {blocks.prefix!r} is shared or a router; nothing can be pruned")
    _warn_left_dense(blocks, uses)
    model.requires_grad_(False)
    for name, new in wrapped.items():
        model.set_submodule(name, new)
    guard_saving(model)
    return wrapped


def _seed_for(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _warn_left_dense(blocks: Blocks, uses: Counter) -> None:
    fused = [f"{name}.{p}" for name, module in blocks.modules[0].named_modules() for p in stacked_weights(module)]
    if not fused:
        fused = [f"{name}.{p}" for name, module in blocks.modules.named_modules() for p in stacked_weights(module)]
    if fused:
        logger.warning("stacked expert weights of %r stay dense: %s", blocks.prefix, ", ".join(fused))
    shared = [n for n, m in blocks.modules.named_modules() if is_linear(m) and uses[id(m.weight)] > 1]
    if shared:
        logger.warning("linears of %r with a shared weight stay dense: %s", blocks.prefix, ", ".join(shared))


def wrapped_linears(model: nn.Module) -> dict[str, MaskedLoRALinear]:
    """All wrapped layers by full name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLoRALinear)}


def merge_model(model: nn.Module) -> nn.Module:
    """Turn every wrapped layer into a plain linear with its effective weight, and every trained norm into a plain one
    with its trained weights, in place. Parameters stay frozen."""
    return replace_layers(model, lambda layer: layer.merge())


def unwrap_model(model: nn.Module) -> nn.Module:
    """Drop masks, adapters and trained norms: plain linears with the layers' dense weights, and the norms as they were
    given, in place. Parameters stay frozen."""
    return replace_layers(model, MaskedLoRALinear.unwrap, TrainedNorm.unwrap)


def replace_layers(
    model: nn.Module,
    made: Callable[[_Layer], nn.Module],
    norm: Callable[[TrainedNorm], nn.Module] = TrainedNorm.merge,
) -> nn.Module:
    """Put ``made(layer)`` in the place of every wrapped layer, and ``norm(layer)`` in the place of every trained norm,
    as ``replace_modules`` does."""
    replace_modules(model, list(wrapped_linears(model)), lambda _, layer: made(cast(_Layer, layer)))
    replace_modules(model, list(trained_norms(model)), lambda _, layer: norm(cast(TrainedNorm, layer)))
    return model


def replace_modules(model: nn.Module, names: Iterable[str], made: Callable[[str, nn.Module], nn.Module]) -> None:
    """Put ``made(name, module)`` in the place of modules. ``made`` sees whole parameters, one module's at a time; in a
    sharded model its result is sharded too. A module goes before the next one is replaced, so that the model never has
    two sets of weights, unless the caller holds the modules."""
    for name in names:
        progress(f"replacing {name}")
        # The new module is in the module that is gathered, so that it is sharded at the end.
        both = nn.ModuleList([model.get_submodule(name)])
        with gathered(both):
            both.append(made(name, both[0]))
        model.set_submodule(name, both[1])


def count_kept(linear: nn.Module) -> int:
    """How many weights of a linear its mask keeps; of a plain linear, how many are not zero. Processes that hold it in
    shards call this together."""
    if not isinstance(linear, MaskedLoRALinear):
        return int(sum_over_rows(cast(Tensor, linear.weight).detach(), torch.count_nonzero))
    columns = linear.in_features
    return int(sum_over_rows(linear.mask.detach(), lambda rows: torch.count_nonzero(unpack_mask(rows, columns))))


def sparsity_of(model: nn.Module) -> tuple[int, int]:
    """(zeros, prunable) over the blocks' linears. Zeros are the weights that the mask prunes, and in a plain or packed
    linear the weights that are exactly zero."""
    zeros = total = 0
    blocks = find_blocks(model)
    for linear in blocks.linears().values():
        total += weight_count(linear)
        zeros += weight_count(linear) - count_kept(linear)
    for module in blocks.modules.modules():
        if isinstance(module, SparseLinear):
            total += weight_count(module)
            zeros += weight_count(module) - int(torch.count_nonzero(module.packed.values))
    return zeros, total
