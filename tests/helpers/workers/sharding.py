"""For ``tests/losa/distributed/test_sharding.py``: a tiny model of whole and of sharded parameters."""

from __future__ import annotations

from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from losa.distributed.collectives import columns_of_all, from_process, reduce_to_process, share_of
from losa.distributed.sharding import (
    device_of,
    gathered,
    gathered_calls,
    make_sharding,
    shard_module,
    sharding_of,
    sum_over_rows,
    whole,
)
from losa.model.blocks import find_blocks
from losa.modules.masked_lora import MaskedLoRALinear
from tests.helpers.processes import finish, start_worker
from tests.helpers.tiny import logits, randomise, tiny_llama, wrap

# By number of processes: how many of them hold a model together.
SHARD_SIZES = {3: [3], 4: [2, 4]}
WIDTH = 24


def equal(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that differ from ``before``, or that are not sharded."""
    now = dict(model.named_parameters())
    wrong = [name for name, p in now.items() if not isinstance(p, DTensor)]
    return wrong + [name for name in before if not torch.equal(whole(now[name]), before[name])]


@torch.no_grad()
def sharded(shard_size: int) -> dict:
    found: dict = {}
    model = tiny_llama(layers=2, tie_word_embeddings=True)
    randomise(wrap(model, rank=3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = logits(model)
    sharding = make_sharding(torch.device("cpu"), shard_size)
    shard_module(model, sharding)
    found["names"] = list(before) == [name for name, _ in model.named_parameters()]
    found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    found["values"] = equal(model, before)
    found["device"], found["same"] = str(device_of(model)), sharding_of(model) == sharding
    found["held"] = sum(p.to_local().numel() for p in model.parameters())
    found["all"] = sum(p.numel() for p in model.parameters())
    blocks = find_blocks(model)
    with gathered_calls(model, blocks):
        found["logits"] = torch.equal(logits(model), expected)
        found["freed"] = all(isinstance(p, DTensor) for block in blocks for p in block.parameters())
    found["after calls"] = equal(model, before)
    found["kept"] = int(sum_over_rows(blocks.modules[0].mlp.up_proj.mask, lambda rows: (rows != 0).sum()))
    found["kept expected"] = int((before["model.layers.0.mlp.up_proj.mask"] != 0).sum())
    found["failing call"] = failing_call(model, blocks)
    found["after a failure"] = equal(model, before)
    found |= changes(model, blocks.modules[0], before)
    return found


def failing_call(model: nn.Module, blocks) -> bool:
    """A forward pass that stops within a block leaves the model sharded, also for the next pass."""
    attention = blocks.modules[1].self_attn
    with gathered_calls(model, blocks):
        handle = attention.register_forward_pre_hook(lambda module, args: 1 / 0)
        with suppress(ZeroDivisionError):
            logits(model)
        handle.remove()
        logits(model)
    return all(isinstance(p, DTensor) for p in model.parameters())


def changes(model: nn.Module, block: nn.Module, before: dict[str, torch.Tensor]) -> dict:
    found: dict = {}
    objects = dict(model.named_parameters())
    layer, name = block.mlp.down_proj, "model.layers.0.mlp.down_proj"
    with gathered(block):
        with gathered(block):  # within itself it does nothing
            layer.set_rank(5)
        layer.set_mask(torch.zeros(layer.weight.shape, dtype=torch.bool))
        layer.replace_weight(layer.weight + 1)
        # New memory, one after the other: a later weight may not be taken for an earlier one whose memory it got.
        for other in (block.self_attn.k_proj, block.self_attn.v_proj):
            other.weight.data = other.weight.data + 1
        block.self_attn.o_proj.weight.data = block.self_attn.o_proj.weight.data  # the same memory: no change
        block.self_attn.q_proj = (
            block.self_attn.q_proj.unwrap()
        )  # another module with the same weight: it shares the rows
        block.mlp.up_proj = nn.Linear(3, 7)  # rows that no process number divides
        after = {f"model.layers.0.{n}": p.detach().clone() for n, p in block.named_parameters()}
    found["changed"] = sorted(n for n, p in model.named_parameters() if n in objects and p is not objects[n])
    found["values after changes"] = equal(model, after)
    found["expected changes"] = sorted(
        [
            *(f"{name}.{part}" for part in ("weight", "mask", "lora_A", "lora_B")),
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ]
    )
    weight = "model.layers.0.self_attn.q_proj.weight"
    rows = [p.to_local().data_ptr() for p in (objects[weight], model.get_parameter(weight))]
    found["shared"] = rows[0] == rows[1]
    found["trained"] = layer.lora_A.requires_grad and not layer.weight.requires_grad
    return found


def mixed() -> list[str]:
    """Names of parameters that are wrong once gathered, or new objects after it: bytes of several dtypes lie side by
    side, in sizes that no alignment divides, and empty parameters have no memory to be known by."""
    torch.manual_seed(0)
    module = nn.Module()
    bits = torch.arange(7, dtype=torch.uint8)
    for name, values in {"a": torch.randn(5, 3).bfloat16(), "b": bits, "c": torch.zeros(0, 4), "d": bits[:0]}.items():
        module.register_parameter(name, nn.Parameter(values.clone(), requires_grad=False))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    shard_module(module, make_sharding(torch.device("cpu")))
    objects = dict(module.named_parameters())
    with gathered(module):
        wrong = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    return wrong + [name for name, p in module.named_parameters() if p is not objects[name]]


def collectives() -> dict:
    rank, count = dist.get_rank(), dist.get_world_size()
    rows = [2, 0, 3, 1][:count]
    everything = torch.arange(sum(rows) * 7, dtype=torch.float32).view(-1, 7)
    mine = everything.split(rows)[rank]
    slices = columns_of_all(mine, rows)
    added = torch.full((3,), float(rank + 1))
    reduce_to_process(added, count - 1)
    return {
        "slice": torch.equal(slices, everything.tensor_split(count, dim=1)[rank]),
        "sum": added.tolist() if rank == count - 1 else None,
        "last": from_process(torch.tensor([rank]), count - 1).tolist(),
        "share": list(share_of(7, 2)),
    }


def two_layers() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(2):
        weight, bias = torch.randn(WIDTH, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
        kept = torch.rand(WIDTH, WIDTH, generator=generator) < 0.5
        layers.append(MaskedLoRALinear(weight, bias, 4, mask=kept, generator=generator))
        nn.init.normal_(layers[-1].lora_B, generator=generator)
    return nn.Sequential(*layers)


def batch(processes: int) -> torch.Tensor:
    """An input for each process."""
    return torch.randn(processes, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def layers_under_fsdp(checkpointing: bool) -> dict:
    """Output and gradients of two layers, without a model around them, that FSDP2 shards."""
    model = two_layers()
    for layer in model:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    x = batch(dist.get_world_size())[dist.get_rank()].requires_grad_()
    y = checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
    y.square().mean().backward()
    gradients = {name: whole(p.grad).tolist() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.tolist(), "input": x.grad.tolist(), "gradients": gradients}


def main() -> None:
    start_worker()
    finish(
        {
            "sharded": {size: sharded(size) for size in SHARD_SIZES[dist.get_world_size()]},
            "collectives": collectives(),
            "mixed": mixed(),
            "layers": [layers_under_fsdp(checkpointing) for checkpointing in (False, True)],
        }
    )
