"""Smaller models of the same kind: rows and columns of block linears that masks prune as a whole are taken away."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.distributed.sharding import Sharding, device_of, gathered_calls, whole
from losa.distributed.watch import progress
from losa.errors import ModelError, OutputError, reason
from losa.model.blocks import find_blocks
from losa.model.running import evaluating
from losa.model.wrapping import replace_modules
from losa_kernels import pack_mask, unpack_mask


def accepted_config(model: Any, settings: Mapping[str, int]) -> Any | None:
    """A copy of the model's configuration with other ``settings`` of its text part; None where transformers would not
    load it back as it is."""
    config = deepcopy(model.config)
    for key, value in settings.items():
        setattr(config.get_text_config(), key, value)
    try:
        read = type(config).from_dict(config.to_dict())
    except Exception:  # transformers raises errors of many kinds
        return None
    text = read.get_text_config()
    return config if all(getattr(text, key, None) == value for key, value in settings.items()) else None


def smaller_model(model: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """A model of the same class with other ``settings``, on meta.

    Raises:
        ModelError: transformers does not build it.
    """
    config = accepted_config(model, settings)
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    if config is None:
        raise ModelError(f"model: {type(model).__name__} takes no configuration with {told}")
    try:
        with torch.device("meta"):
            return type(model)(config)
    except Exception as error:  # transformers raises errors of many kinds
        raise ModelError(f"model: {type(model).__name__} cannot be built with {told} ({reason(error)})") from error


@torch.no_grad()
def shrink_model(
    model: Any, masks: Mapping[str, Tensor], settings: Mapping[str, int], ids: Tensor
) -> dict[str, Tensor]:
    """Take rows and columns of which a mask keeps nothing away from linears and biases, in place, and change the
    configuration. All processes call it together; a model in shards stays in shards.

    Args:
        model: merged.
        masks: packed mask of every linear that shrinks, by name, whole or in shards.
        settings: of the configuration, as the smaller model has them.
        ids: (batch, length) int64 tokens on which both models are compared.

    Returns:
        masks of the new shapes, which keep everything.

    Raises:
        ModelError: a mask that is no product of rows and columns, a pruned weight that is not zero, or a shape
            that ``settings`` does not lead to.
        OutputError: logits that change by more than rounding.
    """
    before = _logits(model, ids)
    small = smaller_model(model, settings)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    new_masks = {}
    for name, mask in masks.items():
        progress(f"reading the mask of {name}")
        rows, columns = kept[name] = _kept(name, whole(mask), model.get_submodule(name).in_features)
        everything = pack_mask(torch.ones(int(rows.sum()), int(columns.sum()), dtype=torch.bool, device=mask.device))
        new_masks[name] = Sharding.of(mask).shard(everything) if isinstance(mask, DTensor) else everything
    for name, (rows, columns) in kept.items():
        _check_zeros(name, whole(model.get_submodule(name).weight), rows, columns)
    replace_modules(model, kept, lambda name, linear: _cut(cast(nn.Linear, linear), *kept[name]))
    for name, parameter in small.named_parameters():
        if (shape := model.get_parameter(name).shape) != parameter.shape:
            raise ModelError(f"{name}: expected shape {list(parameter.shape)} in a smaller model, got {list(shape)}")
    _take_numbers(model, small)
    for key, value in settings.items():
        setattr(model.config.get_text_config(), key, value)
    _check_logits(_logits(model, ids), before, next(model.parameters()).dtype)
    return new_masks


def _kept(name: str, mask: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Which rows and which columns a packed mask keeps, bool (out,) and (in,)."""
    kept = unpack_mask(mask, in_features)
    rows, columns = kept.any(1), kept.any(0)
    if not torch.equal(kept, rows[:, None] & columns):
        raise ModelError(
            f"{name}: expected a mask that prunes whole rows and columns, got one that prunes single weights"
        )
    return rows, columns


def _check_zeros(name: str, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
    rows, columns = rows.to(weight.device), columns.to(weight.device)
    if bool(weight[~rows].any()) or bool(weight[:, ~columns].any()):
        raise ModelError(f"{name}: expected zeros in pruned rows and columns")


def _cut(linear: nn.Linear, rows: Tensor, columns: Tensor) -> nn.Linear:
    """A plain, frozen linear with these rows and columns."""
    rows, columns = rows.to(linear.weight.device), columns.to(linear.weight.device)
    weight = linear.weight.detach()[rows][:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
    return new.train(linear.training)


def _take_numbers(model: nn.Module, small: nn.Module) -> None:
    """Whole numbers that modules keep of their configuration, such as how many query heads share a key head."""
    for name, module in small.named_modules():
        mine = vars(model.get_submodule(name))
        for key, value in vars(module).items():
            if type(value) is int and type(mine.get(key)) is int:
                mine[key] = value


def _logits(model: Any, ids: Tensor) -> Tensor:
    """fp32, on the host, in evaluation mode."""
    with evaluating(model), gathered_calls(model, find_blocks(model)):
        return model(ids.to(device_of(model)), use_cache=False).logits.float().cpu()


def _check_logits(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """The two models add up the same numbers in another order, and rounding grows through the blocks. In 16 bits it
    may grow above what one wrong channel changes, which the checks of zeros and pairs see."""
    tolerance = torch.finfo(dtype).eps ** 0.5
    difference = (found - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    if not difference <= tolerance * scale:
        raise OutputError(
            f"export: logits of the smaller model differ from the masked model's by {difference / scale:.3g} of "
            f"their size, where rounding explains {tolerance:.3g}"
        )
