"""Tables of a run, its model card, and a look into any checkpoint's zeros."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from losa.errors import OutputError
from losa.figures import NAMES
from losa.record import MethodResult, RunRecord

RECORD = "losa_config.json"
HOW = {
    "losa": "pruned round by round and fine-tuned under the mask with adapters of dynamic rank, merged at the end",
    "sparse_lora": "pruned at once, fine-tuned under the mask with adapters of one rank, and merged",
    "lora": "pruned at once, fine-tuned with dense adapters, and merged under the mask, which changes the function",
    "prune_only": "pruned at once, without any training",
    "finetune_then_prune": "fine-tuned dense, then pruned at once, without training afterwards",
}
FORMAT = """The files are an ordinary dense checkpoint with exact zeros: transformers, and whatever else reads the base
model's format, reads this one."""
LIMITS = """Perplexity on one text says little about a task, and one seed little about a method: evaluate on your own.
Pruning can change a model's behaviour, its safety training included. The files are as large as the dense model's, and
only software that makes use of zeros runs them faster."""
LICENCE = """Derived from the base model: its licence and terms of use apply, and those of the training data. losa adds
none."""
RANKLESS = ("prune_only", "finetune_then_prune")
# Matrices of blocks have a number in their name: "model.layers.0.mlp.up_proj.weight", "h.0.attn.c_attn.weight".
BLOCK_WEIGHT = re.compile(r"(.*?\.\d+)\..*weight")
MEASURED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _table(*columns: str, title: str | None = None, caption: str | None = None) -> Table:
    """The first column holds names, the others numbers."""
    table = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    # Text, here and in the rows: brackets in a path are no markup.
    table.title, table.caption = (None if text is None else Text(text) for text in (title, caption))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _span(values: list, show) -> str:
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low}..{high}"


def show_table(table: Table, console: Console) -> None:
    """Print a table: drawn in a terminal, as plain text that is never cut or wrapped anywhere else."""
    if console.is_terminal:
        console.print(table)
    else:
        console.print(plain_text(table), markup=False, highlight=False, soft_wrap=True)


def plain_text(table: Table) -> str:
    """A table in Markdown, ASCII borders, as wide as it needs to be; its title and caption are lines of text."""
    title = [str(table.title), ""] if table.title else []
    caption = ["", str(table.caption)] if table.caption else []
    return "\n".join([*title, *_markdown(table), *caption, ""])


def _markdown(table: Table) -> list[str]:
    bare = Table(*table.columns, box=box.MARKDOWN)
    bare.rows.extend(table.rows)
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False)
    console.print(bare)
    lines = [line.strip() for line in console.file.getvalue().splitlines() if line.strip()]
    # rich leaves alignment out of the rule.
    right = [column.justify == "right" for column in table.columns]
    rules = lines[1].strip("|").split("|")
    lines[1] = "|".join(["", *(r[:-1] + ":" if numeric else r for r, numeric in zip(rules, right, strict=True)), ""])
    return lines


def results_table(record: RunRecord) -> Table:
    """A row per method. LoRA's perplexity is the unmerged model's; what merging under the mask costs stands beside."""
    table = _table("model", "perplexity", "sparsity", "zeros", "trained tokens", "time", title=protocol(record))
    for r in record.results:
        _add(
            table,
            NAMES.get(r.method, r.method),
            _perplexity(r),
            _percent(r.sparsity),
            f"{r.zeros:,}",
            f"{r.train_tokens:,}",
            f"{r.seconds:,.0f} s",
        )
    return table


def _perplexity(result: MethodResult) -> str:
    if result.perplexity_unmerged is None:
        return _number(result.perplexity)
    return f"{_number(result.perplexity_unmerged)} (merged: {_number(result.perplexity)})"


def protocol(record: RunRecord) -> str:
    """How perplexities were measured: text, window length, windows, tokens."""
    if record.evaluation is None:
        return f"{record.model}: no text to evaluate on was given"
    e = record.evaluation
    path, parts = e["data"]["path"], []
    # Subset and split mean something for data sets of the hub only.
    if not (path.startswith("builtin:") or Path(path).suffix or Path(path).exists()):
        parts = [e["data"][key] for key in ("subset", "split") if e["data"].get(key)]
    text = f"{' '.join([path, *parts])}, {e['windows']} non-overlapping windows of {e['length']} tokens"
    return f"{record.model}: perplexity on {text} ({e['tokens']:,} in all)"


def rounds_table(record: RunRecord) -> Table:
    """A row per round: sparsity, ranks, loss, perplexity, time; where the time went is below."""
    stages: dict[str, float] = {}
    for r in record.rounds:
        for stage, value in r.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + value
    spent = ", ".join(f"{stage} {value:,.1f} s" for stage, value in stages.items())
    columns = ("round", "sparsity", "blocks", "mean rank", "ranks", "steps", "loss", "perplexity", "time")
    table = _table(*columns, caption=f"time by stage: {spent}" if spent else None)
    ranked = record.method not in RANKLESS
    for r in record.rounds:
        _add(
            table,
            str(r.index),
            _percent(r.target_sparsity),
            _span(r.sparsity, lambda value: f"{100 * value:.1f}") + " %",
            f"{sum(r.ranks) / len(r.ranks):.2f}" if ranked and r.ranks else "-",
            _span(r.ranks, str) if ranked and r.ranks else "-",
            str(r.train_steps),
            _number(r.train_loss, 3),
            _number(r.perplexity),
            f"{sum(r.seconds.values()):,.0f} s",
        )
    return table


def blocks_table(record: RunRecord) -> Table:
    """A row per block, as the last round left it."""
    columns = ["block", "sparsity", "rank", "error", "importance"]
    last = record.rounds[-1] if record.rounds else None
    if last is not None and last.keep_n is not None:
        columns.append("kept")
    table = _table(*columns)
    for index, name in enumerate(record.blocks if last else []):
        cells = [
            name,
            _percent(last.sparsity[index]),
            "-" if record.method in RANKLESS or not last.ranks else str(last.ranks[index]),
            "-" if last.errors is None else f"{last.errors[index]:.3g}",
            "-" if last.importance is None else f"{last.importance[index]:.4f}",
        ]
        if last.keep_n is not None:
            cells.append(f"{last.keep_n[index]}:{last.m}")
        _add(table, *cells)
    return table


@dataclass
class TensorSparsity:
    """One matrix as it lies in the files; ``zeros`` counts 0.0 and -0.0."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    total: int


@dataclass
class Inspection:
    """``record``: what losa wrote, or None; ``tensors``: every matrix inside a decoder block, measured."""

    record: RunRecord | None
    tensors: list[TensorSparsity] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        return sum(t.zeros for t in self.tensors) / max(1, sum(t.total for t in self.tensors))

    @property
    def lost_zeros(self) -> list[str]:
        """Matrices with more nonzero weights than their recorded mask keeps: changed since losa wrote them."""
        masks = self.record.masks if self.record is not None else {}
        return [
            t.name
            for t in self.tensors
            if (mask := masks.get(t.name.removesuffix(".weight"))) is not None and t.total - t.zeros > mask.kept
        ]


def inspect_directory(directory: Path) -> Inspection:
    """Measure a checkpoint's zeros from its safetensors, one tensor in memory at a time; any Hugging Face directory.

    Raises:
        OutputError: no such directory, no safetensors or no floating-point matrix of a block in it, or a damaged file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise OutputError(f"{directory}: no such directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise OutputError(f"{directory}: expected .safetensors files, found none")
    inspection = Inspection(_read_record(directory / RECORD))
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - not a mapping
                    if BLOCK_WEIGHT.fullmatch(key) and len(handle.get_slice(key).get_shape()) == 2:
                        tensor = handle.get_tensor(key)
                        if tensor.dtype in MEASURED:
                            zeros = tensor.numel() - int(torch.count_nonzero(tensor))
                            inspection.tensors.append(TensorSparsity(key, tuple(tensor.shape), zeros, tensor.numel()))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{file}: damaged ({error})") from error
    if not inspection.tensors:
        raise OutputError(f"{directory}: found no floating-point matrix of a decoder block")
    return inspection


def _read_record(path: Path) -> RunRecord | None:
    if not path.exists():
        return None
    try:
        return RunRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(f"{path}: damaged ({error})") from error


def zeros_table(inspection: Inspection) -> Table:
    """A row per block with the sparsity measured in the files."""
    blocks: dict[tuple[str, int], list[TensorSparsity]] = {}
    for tensor in inspection.tensors:
        prefix, _, number = BLOCK_WEIGHT.fullmatch(tensor.name)[1].rpartition(".")
        blocks.setdefault((prefix, int(number)), []).append(tensor)
    lost = inspection.lost_zeros
    table = _table(
        "block",
        "matrices",
        "weights",
        "zeros",
        "sparsity",
        title=f"measured in the files: {_percent(inspection.sparsity)} zeros",
        caption=f"{len(lost)} matrices have lost zeros since losa wrote them: {lost[0]}, ..." if lost else None,
    )
    for (prefix, number), parts in sorted(blocks.items()):
        zeros, total = sum(t.zeros for t in parts), sum(t.total for t in parts)
        _add(table, f"{prefix}.{number}", str(len(parts)), f"{total:,}", f"{zeros:,}", _percent(zeros / total))
    return table


def model_card(record: RunRecord) -> str:
    """README.md of an exported model: what it is, what was measured and how, and its limits."""
    recipe, prune = record.recipe, record.recipe["prune"]
    goal = f"{prune['pattern']} (kept:of)" if prune.get("pattern") else f"{100 * prune['sparsity']:g} %"
    method = NAMES.get(record.method, record.method)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["losa", "sparse", "pruned"]}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", record.model) and not Path(record.model).exists():
        front["base_model"] = record.model
    settings = {key: value for key, value in recipe.items() if key != "output"}
    environment = ", ".join(f"{key} {value}" for key, value in record.environment.items())
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {re.split('[/:]', record.model.rstrip('/'))[-1]}, {goal} sparse ({method})",
        "",
        f"`{record.model}`, {HOW.get(record.method, method)}, with losa {record.losa_version}. {_zeros(record)}",
        FORMAT,
        "",
        "## Measured",
        "",
        f"{protocol(record)}.",
        "",
        *_markdown(results_table(record)),
        "",
        *(_rounds_section(record) if record.rounds else []),
        f"Times are those of {environment}; the whole run took {record.seconds / 60:,.1f} minutes.",
        "",
        f"`{RECORD}` holds the recipe, rates, ranks, numbers of every round and a checksum of every mask;",
        "`figures/` shows them, each picture with its numbers in a CSV file.",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
        "## Limits",
        "",
        LIMITS,
        "",
        "## Licence",
        "",
        LICENCE,
    ]
    return "\n".join(lines) + "\n"


def _rounds_section(record: RunRecord) -> list[str]:
    table = rounds_table(record)
    caption = [f"{str(table.caption).capitalize()}.", ""] if table.caption else []
    return ["Rounds:", "", *_markdown(table), "", *caption]


def _zeros(record: RunRecord) -> str:
    if not record.masks:
        return "No mask was recorded."
    total = sum(math.prod(mask.shape) for mask in record.masks.values())
    pruned = total - sum(mask.kept for mask in record.masks.values())
    return f"{pruned:,} of {total:,} weights in {len(record.masks)} matrices are pruned ({_percent(pruned / total)})."
