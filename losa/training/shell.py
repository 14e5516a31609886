"""What a round of a sharded model trains: a copy of the model's structure that FSDP2 runs, around the model's own
parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from losa.distributed.sharding import sharding_of
from losa.errors import LosaError
from losa.model.blocks import expert_lists, find_blocks
from losa.modules.linear_experts import all_get_gradients

# FSDPModule's, in torch after 2.11. An expert that no token of a process reaches gets no gradient there: without this
# setting the processes would send gradients of different parameters, and add them up.
_UNUSED = "set_reduce_scatter_unused_params"


def make_shell(
    loss_module: nn.Module, model: nn.Module, *, reshard_after_forward: bool = True
) -> tuple[nn.Module, nn.Module]:
    """A copy of ``loss_module`` for FSDP2 to run. Its sharded parameters are the very parameters of ``model``: who
    trains the copy trains the model, and nothing is copied back. Drop the copy after the round.

    FSDP2's hooks stay with the modules that it takes over, while pruning needs modules without them; so the copy gets
    the hooks. Each decoder block is gathered by itself, everything outside of the blocks together.

    FSDP2 is called directly, not through ``accelerate.Accelerator.prepare``, which shards a whole module in place:
    before each round a process would have to hold the whole model, and FSDP2's hooks would stay in it.

    Args:
        loss_module: holds ``model``. Frozen parameters of its own, which every process has whole, are sharded in the
            copy alone.
        model: sharded, a decoder of transformers.
        reshard_after_forward: whether a block is gathered anew for its backward pass.

    Returns:
        the copy, and the copy of ``model`` in it.

    Raises:
        LosaError: ``loss_module`` does not hold ``model``, or has trained parameters of its own; or as
            ``check_unreached``.
    """
    own = [n for n, p in loss_module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if own:
        raise LosaError(f"loss_factory: expected no trained parameters beside a sharded model's, got {own[0]}")
    sharding = sharding_of(model)
    assert sharding is not None, "the model is sharded"
    if sharding.mesh.size() > 1:
        lists = [experts for block in find_blocks(model) for experts in expert_lists(block)]
        check_unreached(all(map(all_get_gradients, lists)))
    # Parameters and buffers are not copied.
    copies: dict[int, Any] = {id(t): t for t in (*loss_module.parameters(), *loss_module.buffers())}
    shell: Any = copy.deepcopy(loss_module, copies)
    if id(model) not in copies:
        raise LosaError(f"loss_factory: expected a module that holds the model, got {type(loss_module).__name__}")
    blocks = [copies[id(block)] for block in find_blocks(model)]
    inside = {id(module) for block in blocks for module in block.modules()}
    groups = [list(block.modules()) for block in blocks]
    groups.append([module for module in shell.modules() if id(module) not in inside])
    held = [place for group in groups for place in _leave_stand_ins(group)]
    offloading = CPUOffloadPolicy(pin_memory=sharding.device.type == "cuda")
    for module in (*blocks, shell):
        fully_shard(
            module,
            mesh=sharding.mesh,
            # FSDP2 would gather what is outside of the blocks again as soon as the backward pass begins.
            reshard_after_forward=reshard_after_forward and module is not shell,
            offload_policy=offloading if sharding.offload else OffloadPolicy(),
        )
    if hasattr(shell, _UNUSED):
        getattr(shell, _UNUSED)(True)
    # FSDP2 takes the parameters that it finds when the shell first runs.
    for place, name, parameter in held:
        place._parameters[name] = parameter
    return shell, copies[id(model)]


def check_unreached(reached: bool) -> None:
    """For a model that several processes share. Raises LosaError: torch is too old for experts that a process does not
    reach.

    Args:
        reached: whether all trained linears of experts get gradients without tokens too (``all_get_gradients``).
    """
    if not reached and not hasattr(FSDPModule, _UNUSED):
        raise LosaError(
            "model: experts of a mixture that are modules of their own, or whose adapters are not masked-LoRA without "
            f"dropout, cannot be trained in shards by this version of torch, {torch.__version__}; take a newer one, or "
            "distributed.mode: ddp"
        )


def _leave_stand_ins(modules: list[nn.Module]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put whole parameters without memory in the places of the sharded ones, for FSDP2 to find their shapes.

    Returns:
        where each sharded parameter was: module, name and parameter.
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                held.append((module, name, parameter))
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
    return held
