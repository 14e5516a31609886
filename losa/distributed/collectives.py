"""Tensors that processes add up, hand on and share out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from losa.distributed.processes import process_count, process_index


def from_process(tensor: Tensor, index: int) -> Tensor:
    """The tensor of process ``index``, a new one on the device of this process's own; every process has a tensor of
    that shape and dtype. A process that is alone gets its own tensor back."""
    if process_count() == 1:
        return tensor
    shared = _to_send(tensor)
    dist.broadcast(shared, index)
    return shared.to(tensor.device)


def from_rank_zero(tensor: Tensor) -> Tensor:
    """Process 0's tensor (``from_process``), so that all processes decide alike."""
    return from_process(tensor, 0)


def sum_over_processes(statistic: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape and dtype, a new tensor. On a GPU it is only begun, as every
    operation there."""
    total = statistic.clone()
    if process_count() > 1:
        dist.all_reduce(total)
    return total


def reduce_to_process(statistic: Tensor, index: int, reduction: Literal["sum", "max"] = "sum") -> None:
    """Make one tensor of all processes' tensors of one shape and dtype, in place in process ``index``: entry by entry
    their sum, or the largest. In the other processes the tensor then holds nothing of use."""
    if process_count() > 1:
        dist.reduce(statistic, index, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[reduction])


def columns_of_all(mine: Tensor, rows: Sequence[int]) -> Tensor:
    """One slice of columns of every process's rows.

    The columns are cut into as many slices as there are processes, as equal as possible; each process gets its slice
    of all rows. ``mine`` (rows of this process, columns); ``rows``: how many rows each process has.

    Returns:
        (sum of rows, columns of this process's slice), in the order of the processes.
    """
    count = process_count()
    if count == 1:
        return mine
    widths = [len(part) for part in torch.arange(mine.shape[1]).tensor_split(count)]
    sent = torch.cat([part.reshape(-1) for part in mine.tensor_split(count, dim=1)])
    width = widths[process_index()]
    found = sent.new_empty(sum(rows) * width)
    dist.all_to_all_single(found, sent, [n * width for n in rows], [len(mine) * w for w in widths])
    return found.view(sum(rows), width)


def share_of(count: int, unit: int = 1, index: int | None = None) -> range:
    """Which of ``count`` items process ``index`` (default: this one) works on: consecutive ones, in whole units of
    ``unit`` items but for a last unit that is smaller. Shares differ by one unit at most; they are empty where there
    are fewer units than processes."""
    index = process_index() if index is None else index
    units, processes = -(-count // unit), process_count()
    first, last = (units * i // processes * unit for i in (index, index + 1))
    return range(min(first, count), min(last, count))


def _to_send(tensor: Tensor) -> Tensor:
    device = torch.device("cuda") if dist.get_backend() == "nccl" else tensor.device
    return tensor.to(device, copy=True, memory_format=torch.contiguous_format)
