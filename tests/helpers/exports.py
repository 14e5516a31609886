"""Merged models as a run leaves them, for tests of what is written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from losa.model.blocks import find_blocks
from losa.model.wrapping import merge_model, sparsity_of, wrap_model
from losa.output.checks import mask_records
from losa.record import MethodResult, RoundRecord, RunRecord
from tests.helpers.book import matrices
from tests.helpers.tiny import tiny_llama


def pruned(dtype=torch.float32, seed=0, **settings):
    """A merged tiny model with trained-looking adapters, its masks, and the record of both."""
    model = tiny_llama(layers=2, **settings)
    for parameter in model.parameters():  # not the rotary frequencies, which checkpoints do not hold
        parameter.data = parameter.data.to(dtype)
    return prune(model, seed)


def prune(model: nn.Module, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor], RunRecord]:
    """``pruned`` of another model, in place, but for its experts: in a sharded model they stay dense."""
    generator = torch.Generator().manual_seed(seed)
    layers = wrap_model(model, rank=3, scaling=2.0, seed=seed, targets="re:^(?!.*experts)")
    for layer in layers.values():
        layer.set_mask(torch.rand(layer.weight.shape, generator=generator) < 0.5)
        with torch.no_grad():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
    masks = {name: layer.mask.data.clone() for name, layer in layers.items()}
    merge_model(model)
    zeros, prunable = sparsity_of(model)
    blocks = find_blocks(model).names
    record = RunRecord(
        losa_version="0",
        method="losa",
        recipe={"prune": {"pruner": "wanda", "sparsity": 0.5}},
        model="tiny",
        blocks=blocks,
        environment={"torch": torch.__version__},
        rounds=[RoundRecord(1, 0.5, 3.0, [0.5] * len(blocks), [3] * len(blocks))],
        results=[MethodResult("losa", None, zeros / prunable, zeros, prunable, 1.0)],
        masks=mask_records(masks, {name: model.get_submodule(name).in_features for name in masks}),
    )
    return model, masks, record


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory's safetensors files, by their names there."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def all_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights (out, in) of linears in all blocks, by full name; routers are no linears, or are among them."""
    names = {module: name for name, module in model.named_modules()}
    return {name: w for block in find_blocks(model) for name, w in matrices(block, names).items()}
