"""Which process computes which sequences: all of them once, in the same batches, in as many passes."""

from __future__ import annotations

import itertools

import pytest
import torch

from losa.data.sequences import PackedData
from losa.distributed import collectives
from losa.training import dealing
from losa.training.dealing import Batch, deal, seed_of

IDS = torch.arange(1, 41).view(10, 4)
DATA = PackedData(IDS, IDS.clone())


@pytest.fixture
def dealt(monkeypatch):
    """The batches of every process."""

    def deal_to(processes: int, step: range, batch_size: int) -> list[list[Batch]]:
        found = []
        for index in range(processes):
            monkeypatch.setattr(dealing, "process_count", lambda: processes)
            monkeypatch.setattr(collectives, "process_count", lambda: processes)
            monkeypatch.setattr(collectives, "process_index", lambda index=index: index)
            found.append(deal(DATA, step, batch_size, (7, 1)))
        return found

    return deal_to


def rows(batch: Batch) -> list[int]:
    """Numbers of the sequences that have labels."""
    return [int(row[0]) // 4 for row in batch.input_ids] if len(batch.targets) else []


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 9])
def test_every_sequence_is_dealt_once(dealt, processes):
    for first, last, size in itertools.product((0, 3), range(4, 11), (1, 2, 3, 8)):
        found = dealt(processes, range(first, last), size)
        assert [row for batches in found for batch in batches for row in rows(batch)] == list(range(first, last))
        (passes,) = {len(batches) for batches in found}
        whole = -(-(last - first) // min(size, -(-(last - first) // processes)))
        assert passes == -(-whole // processes)
        for batch in itertools.chain(*found):
            assert len(batch.input_ids) <= size and len(batch.positions) == len(batch.targets)


def test_one_process_takes_the_batches_in_order(dealt):
    ((first, last),) = dealt(1, range(4, 7), 2)
    assert torch.equal(first.input_ids, IDS[4:6]) and torch.equal(last.input_ids, IDS[6:7])
    assert first.positions.tolist() == [0, 1, 2, 4, 5, 6] and first.targets.tolist() == [18, 19, 20, 22, 23, 24]


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_a_batch_is_the_same_in_whichever_process(dealt, processes):
    """The same sequences, and so the same seed of dropout."""
    ((*alone,),) = dealt(1, range(8), 2)
    several = [batch for batches in dealt(processes, range(8), 2) for batch in batches if rows(batch)]
    assert [(batch.seed, rows(batch)) for batch in alone] == [(batch.seed, rows(batch)) for batch in several]


def test_processes_beyond_the_batches_get_a_sequence_without_labels(dealt):
    *_, last = dealt(4, range(3), 1)
    assert sorted(len(rows(batch)) for batches in dealt(4, range(3), 1) for batch in batches) == [0, 1, 1, 1]
    assert last[0].input_ids.shape[1] == 4


def test_seeds_differ_and_fit():
    seeds = {seed_of(*numbers) for numbers in itertools.product(range(6), repeat=3)}
    assert len(seeds) == 6**3 and all(0 <= seed < 2**56 for seed in seeds)
    assert seed_of(1, 23) != seed_of(12, 3)
