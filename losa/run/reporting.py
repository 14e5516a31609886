"""What a run says of itself: a line for each result, and the machine in its record."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import nn

import losa_kernels
from losa.distributed.processes import process_count
from losa.distributed.sharding import device_of, sharding_of
from losa.output.tables import results_table, show_table
from losa.record import MethodResult, RunRecord


def environment(model: nn.Module) -> dict:
    """Versions, device, type of the weights and processes, for the record."""
    device = device_of(model)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "losa_kernels": losa_kernels.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "sharded": sharding_of(model) is not None,
    }


def log_result(console: Console, result: MethodResult) -> None:
    """A line for a method's result."""
    value = "" if result.perplexity is None else f", perplexity {result.perplexity:.2f}"
    console.print(f"{result.method}: sparsity {result.sparsity:.3f}{value}, {result.seconds:.0f} s")


def show_written(console: Console, record: RunRecord, output: Path) -> None:
    """The final table, and the files of the output."""
    show_table(results_table(record), console)
    console.print(f"written to {output}: " + ", ".join(sorted(p.name for p in output.iterdir())))
