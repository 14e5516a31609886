"""The record of a run that never was."""

from __future__ import annotations

import torch

from losa.record import MaskRecord, MethodResult, RoundRecord, RunRecord

BLOCKS = 5


def make_record(method="losa", rounds=3, blocks=BLOCKS, **changes) -> RunRecord:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).tolist()

    made = [
        RoundRecord(
            index=t,
            target_sparsity=0.7 * t / rounds,
            mean_rank=5.0 + t,
            sparsity=numbers(blocks),
            ranks=[t + i % 4 for i in range(blocks)],
            errors=numbers(blocks),
            importance=numbers(blocks),
            similarity=numbers(blocks, blocks),
            train_steps=10 * t,
            train_tokens=100 * t,
            train_loss=3.25 - 0.125 * t,
            perplexity=20.125 * t,
            seconds={"rates": 1.5, "train": 20.25},
        )
        for t in range(1, rounds + 1)
    ]
    record = RunRecord(
        losa_version="0.1.0",
        method=method,
        recipe={
            "model": "maker/small-1b",
            "output": "secret-place",
            "prune": {"pruner": "wanda", "sparsity": 0.7, "pattern": None},
            "allocation": {"error": "relative"},
            "train": {"learning_rate": 2e-4},
        },
        model="maker/small-1b",
        blocks=[f"model.layers.{i}" for i in range(blocks)],
        environment={"torch": "2.13.0", "device": "x86_64"},
        rounds=made,
        results=[
            MethodResult("dense", 22.75, 0.0, 3, 1000, 5.0),
            MethodResult("lora", 240.5, 0.7, 700, 1000, 50.0, False, 113.25, 600, 99),
            MethodResult("losa", 104.75, 0.7, 700, 1000, 60.0, True, None, 600, 99),
        ],
        masks={"model.layers.0.mlp.up_proj": MaskRecord("0" * 64, [20, 50], 300)},
        evaluation={
            "data": {"path": "wikitext", "subset": "wikitext-2-raw-v1", "split": "test"},
            "length": 512,
            "windows": 48,
            "tokens": 24576,
        },
        seconds=600.0,
    )
    for key, value in changes.items():
        setattr(record, key, value)
    return record


def cells(table) -> list[list[str]]:
    return [[str(cell) for cell in row] for row in zip(*(column._cells for column in table.columns), strict=True)]
