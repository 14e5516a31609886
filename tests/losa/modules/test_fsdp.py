"""Sharded parameters: FSDP2 on two gloo processes computes what one process computes, mask and adapter sharded too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.losa.modules.test_fsdp import batch, two_layers

dist.init_process_group("gloo")
rank, checkpointing = dist.get_rank(), sys.argv[2] == "checkpointed"
model = two_layers()
for layer in model:
    fully_shard(layer, reshard_after_forward=True)
fully_shard(model, reshard_after_forward=True)
assert all(isinstance(p, DTensor) for p in model.parameters())
x = batch()[rank].requires_grad_()
if checkpointing:
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
else:
    y = model(x)
y.square().mean().backward()
gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
torch.save({"y": y.detach(), "dx": x.grad, "gradients": gradients}, f"{sys.argv[1]}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
# gloo's threads, torn down with the interpreter, abort one run in some thirty.
sys.stderr.flush()
os._exit(0)
"""
WIDTH = 24


def two_layers() -> torch.nn.Sequential:
    from losa.modules.masked_lora import MaskedLoRALinear

    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(2):
        weight = torch.randn(WIDTH, WIDTH, generator=generator)
        kept = torch.rand(WIDTH, WIDTH, generator=generator) < 0.5
        layer = MaskedLoRALinear(weight, torch.randn(WIDTH, generator=generator), 4, mask=kept, generator=generator)
        torch.nn.init.normal_(layer.lora_B, generator=generator)
        layers.append(layer)
    return torch.nn.Sequential(*layers)


def batch() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.subprocess
@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_two_shards_compute_as_one(tmp_path, mode):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3]), "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "worker.py", str(tmp_path), mode]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model, inputs = two_layers(), batch().requires_grad_()
    outputs = torch.stack([model(x) for x in inputs])
    # FSDP takes the mean over processes of the adapters' gradients; each process has its own input.
    sum(y.square().mean() for y in outputs).backward()
    eps = 32 * torch.finfo(torch.float32).eps
    for rank in range(2):
        shard = torch.load(tmp_path / f"{rank}.pt")
        assert (shard["y"] - outputs[rank]).abs().max() <= eps * outputs.abs().max()
        assert (shard["dx"] - inputs.grad[rank]).abs().max() <= eps * inputs.grad.abs().max()
        expected = {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
        assert shard["gradients"].keys() == expected.keys() and len(expected) == 4
        for name, gradient in expected.items():
            assert (shard["gradients"][name] - gradient).abs().max() <= eps * gradient.abs().max()
