"""A model's block linears replaced by masked-LoRA layers, and back: wrapped, merged, unwrapped."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from traceback import clear_frames
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from losa.distributed.offloading import is_offloaded
from losa.distributed.sharding import device_of, gathered, shard_module, sharding_of, sum_over_rows
from losa.distributed.watch import progress
from losa.errors import LosaError, ModelError
from losa.model.blocks import (
    Blocks,
    Targets,
    as_targets,
    find_blocks,
    is_linear,
    is_shared,
    linears_of,
    matches,
    own_weights,
    parameter_uses,
    stacked_weights,
    weight_count,
)
from losa.model.forms import choices_of_form, has_views, holder_of, tensors_of, views, weights_of
from losa.model.norms import trained_norms
from losa.model.probing import read_directly
from losa.model.replacing import as_linears, as_they_were, computes_its_linears, unpacked_as_they_were
from losa.model.running import runnable
from losa.model.saving import guard_saving
from losa.modules.linear_experts import lay_experts_together
from losa.modules.masked_lora import MaskedLoRALinear
from losa.modules.sparse import SparseLinear
from losa.modules.trained_norm import TrainedNorm
from losa_kernels import unpack_mask

logger = logging.getLogger("losa")

NARROW = 0.02  # share of all weights that may stay dense because ranks do not fit


class RankError(ModelError):
    """Ranks that do not fit a model's linears; ``wrap_model`` raises it."""


_Layer = TypeVar("_Layer", bound=MaskedLoRALinear)


def wrap_model(
    model: nn.Module,
    *,
    layer: type[MaskedLoRALinear] = MaskedLoRALinear,
    rank: int,
    highest_rank: int | None = None,
    scaling: float,
    dropout_p: float = 0.0,
    targets: Targets = None,
    seed: int = 0,
) -> dict[str, MaskedLoRALinear]:
    """Replace the blocks' linears by ``layer``, in place, and freeze everything but the adapters.

    The weights stay where they are in memory, but for transposed ones, and stacks of a sharded model; the adapters of a
    sharded model are sharded too. An adapter is seeded by (seed, full name), so another choice of targets does not
    change it. Linears of another form (``losa.model.forms``) are replaced too. Stacks that are none stay dense, and so
    do linears whose weight the model reads itself, with a warning; the model runs on a few tokens to find the latter.
    Until it is merged or unwrapped, a module that reads weights itself in training alone, for a kernel of its own,
    stays in evaluation mode, and ``save_pretrained`` refuses the model.

    Args:
        model: a decoder of transformers.
        layer: ``MaskedLoRALinear`` or a subclass of it.
        rank: of all adapters, 1 to the smaller side of a linear, at most 128.
        highest_rank: that adapters may get later; by default ``rank``. Linears with a smaller side than that stay
            dense, with a warning, where they are few: less than ``NARROW`` of all weights.
        scaling: s in W + s B A.
        dropout_p: 0 <= p < 1, on the adapters' inputs in training.
        targets: which linears of each block; None: all (``find_linears``).
        seed: for the Gaussian ``lora_A``.

    Returns:
        the new layers by full name, in model order.

    Raises:
        ModelError: no blocks, already wrapped, or a target that matches nothing; ``RankError``: ranks that do not fit
            many linears. Then the model is unchanged.
        ModelError, LosaError: as ``losa.model.replacing.as_linears``; forms are put back.
    """
    if wrapped_linears(model):
        raise ModelError("model: already wrapped; merge_model or unwrap_model first")
    unpacked_as_they_were(model)  # adapters know no form
    blocks = find_blocks(model)
    uses, (passed_by, in_training) = parameter_uses(model), _read_directly(model)
    chosen = chosen_linears(blocks, uses, as_targets(targets), passed_by)
    narrow = _narrow(chosen, max(rank, highest_rank or 0)) if layer.has_rank else []
    chosen = {name: linear for name, linear in chosen.items() if name not in narrow}
    own = {name: linear for name, linear in chosen.items() if holder_of(linear) is linear}
    holders = {holder_of(linear) for name, linear in chosen.items() if name not in own}
    shown = chosen.keys() - own.keys()
    del chosen  # copies of transposed weights would wait for each other

    def new_layer(name: str, linear: nn.Linear) -> MaskedLoRALinear:
        generator = torch.Generator().manual_seed(_seed_for(seed, name))
        try:
            new = layer.from_linear(linear, rank, scaling=scaling, dropout_p=dropout_p, generator=generator)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from error
        if (sharding := sharding_of(linear)) is not None:
            shard_module(new, sharding)
        return new

    wrapped = {name: new_layer(name, cast(nn.Linear, linear)) for name, linear in own.items()}
    model.requires_grad_(False)
    names = [name for name, module in blocks.modules.named_modules(prefix=blocks.prefix) if module in holders]
    # Linears of a stack that is not in memory cannot be tried with its own weights.
    tried = [name for name in names if not is_offloaded(model) or computes_its_linears(model.get_submodule(name))]
    left = [name for name in names if name not in tried]
    del holders  # it would keep what was replaced
    try:
        left += as_linears(model, tried, lambda name, linear: new_layer(name, linear) if name in shown else linear)
    except BaseException as error:
        if sharding_of(model) is not None and not isinstance(error, LosaError):
            raise  # perhaps in this process alone, and the others would not come to put anything back
        clear_frames(error.__traceback__)  # they hold the stack that could not be replaced
        as_they_were(model, lambda each: each.unwrap() if isinstance(each, MaskedLoRALinear) else each)
        raise
    _warn_left_dense(blocks, uses, passed_by, narrow, [name.removeprefix(f"{blocks.prefix}.") for name in left])
    for name, new in wrapped.items():
        model.set_submodule(name, new)
    for name in (in_training - passed_by) & wrapped.keys():
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        parent.train = partial(_stay_evaluating, parent)
        parent.eval()
    lay_experts_together(model)
    guard_saving(model)
    return wrapped_linears(model)


def chosen_linears(blocks: Blocks, uses: Counter, targets: list[str], passed_by: set[str]) -> dict[str, nn.Module]:
    """The linears that are wrapped, by full name; of other forms as ``losa.model.forms.views`` shows them. Raises
    ModelError: a target that matches nothing, or nothing can be pruned."""
    every = {name: linears_of(block, uses, []) for name, block in zip(blocks.names, blocks, strict=True)}
    found = {(block, name): m for block, own in every.items() for name, m in own.items()}
    found = {key: m for key, m in found.items() if ".".join(key) not in passed_by}
    names = list(dict.fromkeys(name for _, name in found))
    for target in targets:
        if not any(matches(target, name) for name in names):
            raise ModelError(f"targets: {target!r} matches no linear of a block; there are {', '.join(names)}")
    if not found:
        raise ModelError(f"model: every nn.Linear of {blocks.prefix!r} is shared or a router; nothing can be pruned")
    return {
        ".".join(key): m for key, m in found.items() if not targets or any(matches(each, key[1]) for each in targets)
    }


def _stay_evaluating(module: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of ``module.train``. Adapters inside still drop inputs in training."""
    type(module).train(module, False)
    for layer in module.modules():
        if isinstance(layer, MaskedLoRALinear):
            layer.training = mode
    return module


def _seed_for(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _narrow(linears: Mapping[str, nn.Module], rank: int) -> list[str]:
    """Names of linears that have no room for a rank. Raises RankError where they are more than a few."""
    sides = {name: min(cast(nn.Linear, m).weight.shape) for name, m in linears.items()}
    narrow = [name for name, side in sides.items() if side < rank]
    sizes = {name: weight_count(linear) for name, linear in linears.items()}
    if sum(sizes[name] for name in narrow) >= NARROW * sum(sizes.values()) and narrow:
        name = min(narrow, key=sides.__getitem__)
        raise RankError(f"expected at most {sides[name]} as a rank, the smaller side of {name}, got {rank}")
    return narrow


def _read_directly(model: Any) -> tuple[set[str], set[str]]:
    """Names of linears that are not called, in evaluation and in training: mask and adapter would be passed by. None of
    a model that is not of transformers or cannot run: without numbers, or for reasons that calibration will tell."""
    if not hasattr(model, "get_input_embeddings") or device_of(model).type == "meta":
        return set(), set()
    found: list[set[str]] = []
    for training in (False, True):
        try:
            with runnable(model):
                found.append(read_directly(model, training=training))
        except ModelError as error:
            logger.warning("linears whose weight the model reads itself cannot be found: %s", error)
            found.append(set())
    return found[0], found[1]


def _warn_left_dense(blocks: Blocks, uses: Counter, passed_by: set[str], narrow: list[str], left: list[str]) -> None:
    stays = [(name, m) for name, m in blocks.modules.named_modules() if not has_views(m) or name in left]
    if dense := [f"{name}.{tensor}" for name, m in stays for tensor in _tensors_of_experts(m)]:
        others = f" and {len(dense) - 3} others" if len(dense) > 3 else ""
        logger.warning("stacked expert weights of %r stay dense: %s%s", blocks.prefix, ", ".join(dense[:3]), others)
    modules = blocks.modules.named_modules()
    shared = [name for name, m in modules if (is_linear(m) or has_views(m)) and is_shared(m, uses)]
    if shared:
        logger.warning("linears of %r with a shared weight stay dense: %s", blocks.prefix, ", ".join(shared))
    own = sorted(passed_by & blocks.linears().keys()) if passed_by else []
    if own:
        logger.warning("linears whose weight the model reads itself stay dense: %s", ", ".join(own))
    if narrow:
        logger.warning("linears that are too narrow for their adapters' ranks stay dense: %s", ", ".join(narrow))


def _tensors_of_experts(module: nn.Module) -> list[str]:
    """Names of a module's tensors that hold weights of several experts."""
    held = tensors_of(module) if choices_of_form(module) is not None else {}
    return stacked_weights(module) or [name for name, tensor in held.items() if tensor.ndim > 1]


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
    as_they_were(model, lambda layer: made(cast(_Layer, layer)) if isinstance(layer, MaskedLoRALinear) else layer)
    replace_modules(model, list(wrapped_linears(model)), lambda _, layer: made(cast(_Layer, layer)))
    replace_modules(model, list(trained_norms(model)), lambda _, layer: norm(cast(TrainedNorm, layer)))
    for module in model.modules():
        own = vars(module).get("train")
        if isinstance(own, partial) and own.func is _stay_evaluating:
            del module.train
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


def matrix_weights(model: nn.Module) -> int:
    """Weights in all matrices and stacks of the blocks, wrapped or not. Adapters do not count."""
    sizes: dict[int, int] = {}
    of_forms: set[int] = set()
    for module in find_blocks(model).modules.modules():
        if isinstance(module, (MaskedLoRALinear, SparseLinear)):
            sizes[id(module)] = weight_count(module)
            continue
        if held := tensors_of(module):
            sizes |= {id(held[name]): count for name, count in weights_of(module).items()}
            of_forms.update(map(id, held.values()))
            continue
        # Biases of stacked experts are matrices too, (experts, out).
        stacks = [module.get_parameter(name) for name in stacked_weights(module)]
        own = [w for w in stacks or own_weights(module) if id(w) not in of_forms]
        sizes |= {id(w): w.numel() for w in own if w.is_floating_point()}
    return sum(sizes.values())


def unprunable_of(model: nn.Module) -> int:
    """Weights in matrices and stacks of the blocks that ``sparsity_of`` does not count: routers, shared weights, stacks
    that stand for no linears."""
    blocks = find_blocks(model)
    packed = [module for module in blocks.modules.modules() if isinstance(module, SparseLinear)]
    return matrix_weights(model) - sum(map(weight_count, [*blocks.linears().values(), *packed]))


def zeros_of(block: nn.Module) -> tuple[int, int]:
    """(zeros, prunable) of the weights of a block's linears, which are in memory, masks or not."""
    weights = [cast(Tensor, linear.weight) for linear in linears_of(block, parameter_uses(block), []).values()]
    prunable = sum(weight.numel() for weight in weights)
    return prunable - sum(int(torch.count_nonzero(weight)) for weight in weights), prunable


def sparsity_of(model: nn.Module) -> tuple[int, int]:
    """(zeros, prunable) over the blocks' linears. Zeros are the weights that the mask prunes, and in a plain or packed
    linear the weights that are exactly zero."""
    zeros = total = 0
    blocks = find_blocks(model)
    in_shards: dict[nn.Module, None] = {}
    for linear in blocks.linears().values():
        total += weight_count(linear)
        holder = holder_of(linear)
        if holder is not linear and sharding_of(holder) is not None:
            in_shards[holder] = None
        else:
            zeros += weight_count(linear) - count_kept(linear)
    for holder in in_shards:
        tensors, counts = tensors_of(holder), weights_of(holder)
        if all(tensors[name].numel() == count for name, count in counts.items()):
            zeros += sum(
                n - int(sum_over_rows(tensors[name].detach(), torch.count_nonzero)) for name, n in counts.items()
            )
            continue
        with gathered(holder):  # there are rows that no linear has
            zeros += sum(weight_count(linear) - count_kept(linear) for linear in views(holder).values())
    for module in blocks.modules.modules():
        if isinstance(module, SparseLinear):
            total += weight_count(module)
            zeros += weight_count(module) - int(torch.count_nonzero(module.packed.values))
    return zeros, total
