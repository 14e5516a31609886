"""Gradient clipping, of whole parameters and of sharded ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from losa.distributed.collectives import sum_over_processes
from losa.distributed.sharding import Sharding


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients in place so that their norm over all parameters is at most ``largest``; processes that share
    parameters do it together. No number of the device is read, unless the rows are offloaded.

    Squares are added up in fp64, so that the norm rounds alike whoever holds which rows: a factor that differs in the
    last bit changes every weight, and in time a mask.

    Returns:
        scalar tensor, the norm before, in the parameters' dtype. All processes get the same bits, and decide alike.
    """
    first = parameters[0]
    sharding = Sharding.of(first) if isinstance(first, DTensor) else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    rows = [r for r in rows if r.numel()]
    norms = torch.stack(torch._foreach_norm(rows, 2, dtype=torch.float64)) if rows else torch.zeros(1).double()
    square = norms.square().sum()
    if sharding is not None:
        # NCCL cannot add up what lies in host memory.
        copies = sharding.mesh.size() // sharding.shards
        square = sum_over_processes(square.to(sharding.device)) / copies
    norm = square.sqrt().to(first.dtype)
    if rows:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(rows, factor.to(rows[0].device))
    return norm
