"""What of a wrapped model a resume state holds, and putting it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from losa.distributed.sharding import gathered, whole
from losa.errors import OutputError
from losa.model.blocks import find_blocks
from losa.model.norms import trained_norms
from losa.model.wrapping import wrapped_linears
from losa.modules.masked_lora import MaskedLoRALinear
from losa.run.states import State, load_tensors, stored_shapes
from losa.training.position import empty_moments

MASK, WEIGHT = "mask", "weight"
MEASURED = "measured."  # before the names of what the engine has measured once


def pruned_tensors(model: nn.Module, measured_once: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a round's pruning decides: masks, and the weights that a pruner has replaced, by full name; and what it has
    measured for later rounds (``Engine.measured_once``)."""
    decided = {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in wrapped_linears(model).items()
        for part in (MASK, *([WEIGHT] if layer.weight_replaced else []))
    }
    return decided | {MEASURED + name: tensor for name, tensor in measured_once.items()}


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters, and the weights of trained norms, by full name."""
    adapters = {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in wrapped_linears(model).items()
        for part in layer.adapter_parts
    }
    return adapters | {
        f"{name}.{part}": parameter.detach()
        for name, norm in trained_norms(model).items()
        for part, parameter in norm.named_parameters(recurse=False)
    }


def restore(model: nn.Module, state: State, measured_once: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put masks, replaced weights, adapters and trained norms back into a freshly wrapped model, plain or sharded. All
    processes call it together; no process gets more than a block of the model whole.

    Args:
        model: of the layers that the state holds.
        state: as it was read.
        measured_once: gets what ``pruned_tensors`` took of it.

    Returns:
        AdamW's moments (``TrainState.moments``), as they were when the state was saved.

    Raises:
        OutputError: the state belongs to a model of other layers or shapes. The model is unchanged then.
    """
    layers = wrapped_linears(model)
    held, stored = stored_shapes(state.path), stored_shapes(state.base)
    _check_layers(state.path, layers, stored | held)
    # New tensors: the layer's own weight is the dense model's, which stays as it is.
    pruned = {
        f"{name}.{part}": torch.empty_like(getattr(layer, part).detach())
        for name, layer in layers.items()
        for part in (MASK, WEIGHT)
        if f"{name}.{part}" in stored
    }
    found = {
        name: torch.empty(shape, dtype=torch.float64) for name, shape in stored.items() if name.startswith(MEASURED)
    }
    load_tensors(state.base, pruned | found)
    decided = {*pruned, *found}
    measured_once.update({name.removeprefix(MEASURED): tensor for name, tensor in found.items()})
    full_names = {id(layer): name for name, layer in layers.items()}
    for block in find_blocks(model):
        with gathered(block):
            for layer in block.modules():
                if (name := full_names.get(id(layer))) is not None:
                    assert isinstance(layer, MaskedLoRALinear)
                    if (weight := pruned.pop(f"{name}.{WEIGHT}", None)) is not None:
                        layer.replace_weight(whole(weight))
                    if layer.rank:
                        layer.set_rank(held[f"{name}.lora_A"][0])
                    layer.set_mask(whole(pruned.pop(f"{name}.{MASK}")))
    trained = trained_tensors(model)
    moments = empty_moments(model, (name for name in held if name not in decided and name not in trained))
    load_tensors(state.path, trained | moments)
    return moments


def _check_layers(path: Path, layers: dict[str, MaskedLoRALinear], stored: dict[str, tuple[int, ...]]) -> None:
    there = {key.removesuffix(f".{MASK}") for key in stored if key.endswith(f".{MASK}")}
    if odd := sorted(there ^ set(layers)):
        where = "the model" if odd[0] in there else "the checkpoint"
        raise OutputError(f"checkpoint {path}: belongs to another model; {where} lacks {odd[0]} (of {len(odd)})")
    for name, layer in layers.items():
        rank = stored[f"{name}.lora_A"][0] if layer.rank else 0
        expected = {MASK: layer.mask.shape, **layer.adapter_shapes(rank), WEIGHT: layer.weight.shape}
        for part, shape in expected.items():
            found = stored.get(f"{name}.{part}", tuple(shape))
            if found != tuple(shape):
                message = f"belongs to another model; {name}.{part}: expected {tuple(shape)}, found {found}"
                raise OutputError(f"checkpoint {path}: {message}")
