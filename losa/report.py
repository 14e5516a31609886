"""Tables of a run, its model card, and a look into any checkpoint's zeros."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from safetensors import safe_open

from losa.errors import OutputError
from losa.record import MethodResult, RunRecord

RECORD = "losa_config.json"
NAMES = {
    "dense": "dense",
    "prune_only": "pruned only",
    "lora": "pruned + LoRA (not mergeable)",
    "sparse_lora": "pruned + sparse LoRA, merged",
    "losa": "LoSA, merged",
    "finetune_then_prune": "LoRA, then pruned",
}


def _headline(result: MethodResult) -> float | None:
    return result.perplexity if result.perplexity_unmerged is None else result.perplexity_unmerged


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _result_rows(record: RunRecord) -> list[list[str]]:
    rows = []
    for r in record.results:
        perplexity = _number(_headline(r))
        if r.perplexity_unmerged is not None:
            perplexity += f" (merged: {_number(r.perplexity)})"
        cells = [NAMES.get(r.method, r.method), perplexity, f"{100 * r.sparsity:.1f} %", f"{r.zeros:,}"]
        rows.append([*cells, f"{r.train_tokens:,}", f"{r.seconds:.0f} s"])
    return rows


RESULT_COLUMNS = ("model", "perplexity", "sparsity", "zeros", "trained tokens", "time")


def results_table(record: RunRecord) -> Table:
    """A row per method. LoRA's perplexity is that of the unmerged model; merging under the mask costs what it says."""
    table = Table(*RESULT_COLUMNS, title=_protocol(record), title_justify="left")
    for row in _result_rows(record):
        table.add_row(*row)
    return table


def _protocol(record: RunRecord) -> str:
    if record.evaluation is None:
        return f"{record.model}: no evaluation text given"
    e = record.evaluation
    data = e["data"]["path"]
    return f"{record.model}: perplexity on {data}, length {e['length']}, {e['windows']} windows, {e['tokens']:,} tokens"


def rounds_table(record: RunRecord) -> Table:
    """A row per round: sparsity, ranks, loss, perplexity and where the time went."""
    table = Table("round", "sparsity", "blocks", "mean rank", "ranks", "steps", "loss", "perplexity", "seconds")
    for r in record.rounds:
        mean = sum(r.ranks) / len(r.ranks)
        table.add_row(
            str(r.index),
            f"{r.target_sparsity:.3f}",
            f"{min(r.sparsity):.3f}..{max(r.sparsity):.3f}",
            f"{mean:.2f}",
            f"{min(r.ranks)}..{max(r.ranks)}",
            str(r.train_steps),
            _number(r.train_loss, 3),
            _number(r.perplexity),
            ", ".join(f"{stage} {value:.0f}" for stage, value in r.seconds.items()),
        )
    return table


def blocks_table(record: RunRecord) -> Table:
    """A row per block, as the last round left it."""
    table = Table("block", "sparsity", "rank", "error", "importance", "keep_n")
    last = record.rounds[-1] if record.rounds else None
    for index, name in enumerate(record.blocks if last else []):
        table.add_row(
            name,
            f"{last.sparsity[index]:.4f}",
            str(last.ranks[index]),
            "-" if last.errors is None else f"{last.errors[index]:.3g}",
            "-" if last.importance is None else f"{last.importance[index]:.4f}",
            "-" if last.keep_n is None else f"{last.keep_n[index]}:{last.m}",
        )
    return table


@dataclass
class TensorSparsity:
    name: str
    shape: tuple[int, ...]
    zeros: int
    total: int


@dataclass
class Inspection:
    """``record``: what losa wrote, or None; ``tensors``: every matrix inside a decoder block, measured."""

    record: RunRecord | None
    tensors: list[TensorSparsity]

    @property
    def sparsity(self) -> float:
        return sum(t.zeros for t in self.tensors) / max(1, sum(t.total for t in self.tensors))


def inspect_directory(directory: Path) -> Inspection:
    """Measure a checkpoint's zeros from its safetensors, one tensor in memory at a time; any Hugging Face directory.

    Raises:
        OutputError: no such directory, no safetensors in it, or a damaged record.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise OutputError(f"{directory}: no directory with .safetensors files")
    record = None
    if (directory / RECORD).exists():
        try:
            record = RunRecord.from_dict(json.loads((directory / RECORD).read_text()))
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{directory / RECORD}: damaged ({error})") from error
    tensors = []
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                if re.search(r"\.\d+\..*weight$", key):
                    tensor = handle.get_tensor(key)
                    if tensor.dim() == 2:
                        zeros = tensor.numel() - int(torch.count_nonzero(tensor))
                        tensors.append(TensorSparsity(key, tuple(tensor.shape), zeros, tensor.numel()))
    return Inspection(record, tensors)


def zeros_table(inspection: Inspection) -> Table:
    """A row per block with the sparsity measured in the files."""
    blocks: dict[str, list[TensorSparsity]] = {}
    for tensor in inspection.tensors:
        blocks.setdefault(re.match(r".*?\.\d+(?=\.)", tensor.name).group(), []).append(tensor)
    table = Table(
        "block", "matrices", "weights", "zeros", "sparsity", title=f"measured: {inspection.sparsity:.4f} zeros"
    )
    for name, parts in sorted(blocks.items(), key=lambda item: int(item[0].rpartition(".")[2])):
        zeros, total = sum(t.zeros for t in parts), sum(t.total for t in parts)
        table.add_row(name, str(len(parts)), f"{total:,}", f"{zeros:,}", f"{zeros / total:.4f}")
    return table


def model_card(record: RunRecord) -> str:
    """README.md of an exported model: what it is, what was measured and how, and its limits."""
    goal = record.recipe["prune"].get("pattern") or f"{100 * record.recipe['prune']['sparsity']:.0f} %"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [losa, sparse, pruned]",
        "---",
        "",
        f"# {Path(record.model).name}, {goal} sparse by {NAMES.get(record.method, record.method)}",
        "",
        f"Made from `{record.model}` with losa {record.losa_version}: pruned by {record.recipe['prune']['pruner']} and "
        f"fine-tuned under the mask (method `{record.method}`). Weights are ordinary dense tensors with exact zeros; any "
        "transformers version loads them.",
        "",
        f"{_protocol(record)}.",
        "",
        "| " + " | ".join(RESULT_COLUMNS) + " |",
        "|" + "---|" * len(RESULT_COLUMNS),
        *("| " + " | ".join(row) + " |" for row in _result_rows(record)),
        "",
        "Times were taken on "
        + ", ".join(f"{key} {value}" for key, value in record.environment.items())
        + ". `losa_config.json` holds the whole recipe, rates, ranks, checksums of the masks and numbers per round; "
        "`figures/` shows them.",
        "",
        "## Limits",
        "",
        "Perplexity on one text says little about a task: evaluate on yours. Pruning can change a model's behaviour, its "
        "safety training included. The licence of the base model and of the training data apply.",
    ]
    return "\n".join(lines) + "\n"
