"""Heads and MLP channels of a model: the linears that they run through, and the smaller model without some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from losa.distributed.sharding import whole
from losa.errors import ModelError, RecipeError
from losa.model.blocks import find_blocks
from losa.model.forms import holder_of
from losa.model.shrinking import accepted_config, shrink_model, smaller_model
from losa.pruners.structure import ROLES, Counts, Structure
from losa.recipe.sections import AllocationConfig, PruneConfig
from losa.record import ShrunkRecord
from losa_kernels import unpack_mask


def check_rates(prune: PruneConfig, allocation: AllocationConfig) -> None:
    """Raises RecipeError for rates that differ between blocks, which a structured pruner cannot follow."""
    if allocation.rates != "uniform":
        raise RecipeError(
            f"allocation.rates: expected uniform, got {allocation.rates!r}: prune.pruner {prune.pruner!r} removes as "
            "many heads and channels from every block, for which config.json has one number each"
        )


def find_structure(model: Any) -> Structure:
    """The structure of a model whose blocks are of Llama's kind, wrapped or not, on any device.

    A model of the same class with fewer heads and channels is built on meta. Only the blocks' seven linears may have
    other shapes there, so that slicing them gives the smaller model.

    Raises:
        ModelError: another kind of model; names it, what was looked for and what was found.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    where = f"model: heads and channels cannot be removed from a model of type {kind!r}"
    blocks = find_blocks(model)
    linears = blocks.linears()
    names = {_role(name): name.removeprefix(f"{blocks.names[0]}.") for name in linears if blocks.index_of(name) == 0}
    wanted = {f"{block}.{names.get(role, role)}" for block in blocks.names for role in ROLES}
    if wanted != linears.keys():
        # Experts have linears of the same names, somewhere else.
        own = (name for name, linear in linears.items() if holder_of(linear) is linear)
        found = ", ".join(sorted({_role(name) for name in own}))
        raise ModelError(f"{where}: expected {', '.join(ROLES)} in every block, as in Llama; found {found}")
    text = model.config.get_text_config()
    wanted_sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes: dict[str, Any] = {key: getattr(text, key, None) for key in wanted_sizes}
    sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
    if not all(type(size) is int and size > 0 for key, size in sizes.items() if key != "head_dim"):
        told = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise ModelError(f"{where}: expected one number of each for all blocks in config.json; found {told}")
    hidden, channels, heads, groups, head_dim = sizes.values()
    head_dim = head_dim or hidden // heads
    full = Counts(groups, heads // groups, channels)
    shapes = _shapes(full, head_dim, hidden)
    for name, linear in linears.items():
        if (shape := (linear.out_features, linear.in_features)) != shapes[_role(name)]:
            numbers = f"{heads} heads of {head_dim} features, {groups} key heads and {channels} channels"
            raise ModelError(f"{where}: expected {name} of shape {shapes[_role(name)]} by {numbers}; found {shape}")
    pairs = [(g, p) for g in range(1, groups + 1) for p in range(1, full.per_group + 1)]
    configs = (accepted_config(model, _settings(Counts(*pair, channels), head_dim)) for pair in pairs)
    accepted = [pair for pair, config in zip(pairs[:-1], configs, strict=False) if config is not None]
    choices = (*accepted, pairs[-1])  # the last pair is the model's own
    structure = Structure(hidden, head_dim, full, names, choices)
    _check_smaller(model, structure, linears, where)
    return structure


def _role(name: str) -> str:
    return name.rpartition(".")[2]


def shrink(model: nn.Module, masks: Mapping[str, Tensor], ids: Tensor) -> tuple[dict[str, Tensor], ShrunkRecord]:
    """Make a merged model smaller by the heads and channels that a structured pruner has removed, in place.

    Args:
        masks: packed mask of every linear of the blocks, by name in the model, whole or in shards.
        ids: (batch, length) int64 tokens on which the smaller model is compared with the masked model.

    Returns:
        masks of the new shapes, which keep everything; and what was removed.

    Raises:
        ModelError, OutputError: as ``find_structure`` and ``shrink_model``; or masks of a block that keep different
            heads or channels.
    """
    structure, first = find_structure(model), find_blocks(model).names[0]
    for block in find_blocks(model).names:
        _check_pairs(
            structure, block, {role: whole(masks[f"{block}.{name}"]) for role, name in structure.linears.items()}
        )
    full = structure.full

    def rows(role: str, columns: int) -> int:
        mask = whole(masks[f"{first}.{structure.linears[role]}"])
        return int(unpack_mask(mask, columns).any(1).sum())

    heads, groups = (rows(role, structure.hidden) // structure.head_dim for role in ("q_proj", "k_proj"))
    left = Counts(groups, heads // groups, rows("up_proj", structure.hidden))
    before, after = (_settings(counts, structure.head_dim) for counts in (full, left))
    new_masks = shrink_model(model, masks, after, ids)
    removed = len(find_blocks(model)) * (structure.weights(full) - structure.weights(left))
    return new_masks, ShrunkRecord({key: [before[key], after[key]] for key in before}, removed)


def _check_pairs(structure: Structure, block: str, masks: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless all linears of a block keep the same heads and channels. ``masks``: packed, by role."""
    hidden, full = structure.hidden, structure.full
    widths = {"o_proj": full.heads * structure.head_dim, "down_proj": full.channels}
    kept = {r: unpack_mask(m, widths.get(r, hidden)).any(0 if r in widths else 1) for r, m in masks.items()}
    groups = {role: kept[role].view(full.groups, -1).any(1) for role in ("q_proj", "k_proj")}
    pairs = [("q_proj", "o_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("up_proj", "down_proj")]
    for one, other in pairs:
        if not torch.equal(kept[one], kept[other]):
            raise ModelError(f"{block}: expected masks of {one} and {other} that keep the same heads or channels")
    if not torch.equal(groups["q_proj"], groups["k_proj"]):
        raise ModelError(f"{block}: expected masks of q_proj and k_proj that keep the same groups of heads")


def _check_smaller(model: Any, structure: Structure, linears: Iterable[str], where: str) -> None:
    """Raises ModelError unless the smallest model of the class differs in the shapes of ``linears`` alone."""
    groups, per_group = min(structure.choices, key=lambda pair: pair[0] * pair[1])
    least = Counts(groups, per_group, max(1, structure.full.channels - 1))
    small = smaller_model(model, _settings(least, structure.head_dim))
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model)}
    slices = _shapes(least, structure.head_dim, structure.hidden)
    for name in linears:
        shapes |= {f"{name}.weight": slices[_role(name)], f"{name}.bias": slices[_role(name)][:1]}
    for name, tensor in _tensors(small):
        if tuple(tensor.shape) != shapes.get(name):
            told = f"with fewer heads and channels {name} has shape {tuple(tensor.shape)}"
            raise ModelError(f"{where}: expected other shapes of {', '.join(ROLES)} alone; {told}")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _shapes(counts: Counts, head_dim: int, hidden: int) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear, by role."""
    queries, keys, channels = counts.heads * head_dim, counts.groups * head_dim, counts.channels
    into = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": channels, "up_proj": channels}
    return {role: (size, hidden) for role, size in into.items()} | {
        "o_proj": (hidden, queries),
        "down_proj": (hidden, channels),
    }


def _settings(counts: Counts, head_dim: int) -> dict[str, int]:
    """What config.json says of such blocks."""
    return {
        "num_attention_heads": counts.heads,
        "num_key_value_heads": counts.groups,
        "head_dim": head_dim,
        "intermediate_size": counts.channels,
    }
