"""A decoder's norms, found in any Hugging Face model, and trained."""

from __future__ import annotations

from torch import nn

from losa.distributed.sharding import gathered, shard_module, sharding_of
from losa.errors import ModelError
from losa.model.blocks import Blocks, find_blocks, parameter_uses
from losa.modules.trained_norm import TrainedNorm


def find_norms(blocks: Blocks) -> dict[str, nn.Module]:
    """The norms within the blocks and beside their list, by full name: the norm before the output layer is one.

    A norm is a module without children whose class is named after what it is and that has parameters. One whose
    parameters occur elsewhere in the model too is left out.
    """
    uses, (outside, _, inner) = parameter_uses(blocks.model), blocks.prefix.rpartition(".")
    beside = {name: m for name, m in blocks.model.get_submodule(outside).named_children() if name != inner}
    found = {f"{blocks.prefix}.{name}": m for name, m in blocks.modules.named_modules()}
    found |= {f"{outside}.{name}".lstrip("."): m for name, m in beside.items()}
    return {name: m for name, m in found.items() if _is_norm(m) and all(uses[id(p)] == 1 for p in m.parameters())}


def _is_norm(module: nn.Module) -> bool:
    childless = next(module.children(), None) is None
    return childless and "norm" in type(module).__name__.lower() and next(module.parameters(), None) is not None


def train_norms(model: nn.Module) -> dict[str, TrainedNorm]:
    """Put a ``TrainedNorm`` in the place of every norm in the decoder's blocks and beside their list, in place. In a
    sharded model they are sharded too. ``merge_model`` turns them into plain norms again. ``wrap_model``, which freezes
    everything but adapters, comes first.

    Returns:
        the trained norms by full name.

    Raises:
        ModelError: the model has no blocks, or no norm with parameters.
    """
    made = {}
    for name, norm in find_norms(find_blocks(model)).items():
        sharding = sharding_of(norm)
        with gathered(norm):
            made[name] = TrainedNorm(norm)
        if sharding is not None:
            shard_module(made[name], sharding)
        model.set_submodule(name, made[name])
    if not made:
        raise ModelError("model: expected norms with parameters in or beside the decoder's blocks, found none to train")
    return made


def trained_norms(model: nn.Module) -> dict[str, TrainedNorm]:
    """All trained norms by full name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedNorm)}
