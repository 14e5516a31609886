"""Which process computes which sequences of an optimiser step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from losa.data.sequences import IGNORED, PackedData
from losa.distributed.collectives import share_of
from losa.distributed.processes import process_count
from losa.training.loss import label_positions


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass in host memory: ``input_ids`` (batch, length) int64; ``positions`` and ``targets``
    of ``label_positions``; ``seed``, for dropout; ``counts``: False for a sequence that fills up."""

    seed: int
    counts: bool
    input_ids: Tensor
    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors on a device. The host does not wait for a GPU to take them."""
        # Only from pinned memory does a copy run beside the GPU's other work.
        ids, positions, targets = (
            (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
            for tensor in (self.input_ids, self.positions, self.targets)
        )
        return ids, positions, targets


def deal(data: PackedData, step: range, batch_size: int, seed: tuple[int, ...]) -> list[Batch]:
    """This process's batches of one optimiser step.

    The step's sequences are dealt out in order, in whole batches. Batches are smaller where there would be fewer than
    processes; but for that a batch is computed in the same way however many processes there are. Dropout differs where
    batches differ. All processes get the same number of batches, because gradients are summed together: a process with
    too few gets a sequence without labels.

    Args:
        step: the step's sequences, at least one.
        batch_size: most sequences of a batch.
        seed: the step's; with it a batch has the same seed in whichever process.
    """
    processes, count = process_count(), len(step)
    size = min(batch_size, -(-count // processes))
    batches_of_all = -(-count // size)
    mine = share_of(count, size)
    batches = [_batch(data, step[i : min(i + size, mine.stop)], (*seed, i // size)) for i in mine[::size]]
    while len(batches) * processes < batches_of_all:
        batches.append(_batch(data, step[:1], (*seed, batches_of_all), counts=False))
    return batches


def _batch(data: PackedData, sequences: range, seed: tuple[int, ...], counts: bool = True) -> Batch:
    ids, labels = (t[sequences.start : sequences.stop] for t in (data.input_ids, data.labels))
    labels = labels if counts else torch.full_like(labels, IGNORED)
    return Batch(seed_of(*seed), counts, ids, *label_positions(labels))


def seed_of(*numbers: int) -> int:
    """A seed for a random generator, unrelated to the seeds of other numbers: 0 to 2^56 - 1."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")
