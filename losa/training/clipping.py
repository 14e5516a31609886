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

    Returns:
        scalar tensor, the norm before, in the parameters' dtype. All processes get the same bits, and decide alike.
    """
    first = parameters[0]
    if not isinstance(first, DTensor):
        return nn.utils.clip_grad_norm_(parameters, largest)
    sharding = Sharding.of(first)
    # torch would add up DTensor norms within each group of processes, and on the rows' device: replicas could then
    # differ in the last bit, and NCCL cannot add up what lies in host memory.
    rows = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    rows = [r for r in rows if r.numel()]
    square = nn.utils.get_total_norm(rows).to(sharding.device, torch.float64).square()
    copies = sharding.mesh.size() // sharding.shards
    norm = (sum_over_processes(square) / copies).sqrt().to(first.dtype)
    if rows:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(rows, factor.to(rows[0].device))
    return norm
