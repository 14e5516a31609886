"""The model card of a run."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from losa.output.tables import markdown, percent, protocol, results_table, rounds_table, shrunk_weights
from losa.recipe.methods import find_method, method_label
from losa.record import RunRecord
from losa.storage.files import RECORD

FORMAT = """The files are an ordinary dense checkpoint with exact zeros: transformers, and whatever else reads the base
model's format, reads this one."""
SHRUNK_FORMAT = """The files are an ordinary dense checkpoint of a smaller model of the base model's class:
transformers reads it, and so does whatever else reads that class in other sizes."""
LIMITS = """Perplexity on one text says little about a task, and one seed little about a method: evaluate on your own.
Pruning can change a model's behaviour, its safety training included."""
AS_LARGE = """ The files are as large as the dense model's, and
only software that makes use of zeros runs them faster."""
LICENCE = """Derived from the base model: its licence and terms of use apply, and those of the training data. losa adds
none."""


def model_card(record: RunRecord) -> str:
    """README.md of an exported model: what it is, what was measured and how, and its limits."""
    recipe, goal = record.recipe, _goal(record)
    label, method = method_label(record.method), find_method(record.method)
    done = label if method is None else method.sentence
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
        f"# {re.split('[/:]', record.model.rstrip('/'))[-1]}, {goal} ({label})",
        "",
        f"`{record.model}`, {done}, with losa {record.losa_version}. {_zeros(record)}",
        FORMAT if record.shrunk is None else SHRUNK_FORMAT,
        "",
        "## Measured",
        "",
        f"{protocol(record)}.",
        "",
        *markdown(results_table(record)),
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
        LIMITS + AS_LARGE if record.shrunk is None else LIMITS,
        "",
        "## Licence",
        "",
        LICENCE,
    ]
    return "\n".join(lines) + "\n"


def _goal(record: RunRecord) -> str:
    prune = record.recipe["prune"]
    goal = f"{prune['pattern']} (kept:of)" if prune.get("pattern") else f"{100 * prune['sparsity']:g} %"
    if record.shrunk is not None:
        return f"{goal} of the blocks removed"
    if record.masks and record.leaves_dense:
        return f"{goal} sparse where it is pruned, {percent(record.sparsity_of_blocks)} of the weights in its blocks"
    return f"{goal} sparse"


def _rounds_section(record: RunRecord) -> list[str]:
    table = rounds_table(record)
    caption = [f"{str(table.caption).capitalize()}.", ""] if table.caption else []
    return ["Rounds:", "", *markdown(table), "", *caption]


def _zeros(record: RunRecord) -> str:
    if not record.masks:
        return "No mask was recorded."
    pruned, total = record.masked
    if (shrunk := record.shrunk) is not None:
        sizes = ", ".join(
            f"`{key}` {before} -> {after}" for key, (before, after) in shrunk.config.items() if after != before
        )
        return f"{shrunk_weights(shrunk, total)}: {sizes}."
    text = f"{pruned:,} of {total:,} weights in {len(record.masks)} matrices are pruned ({percent(pruned / total)})."
    if record.unmasked:
        share = percent(record.sparsity_of_blocks)
        text += f" The blocks have {record.unmasked:,} weights in other matrices; of all of them {share} are pruned."
    return text
