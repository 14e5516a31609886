"""Zero-shot tasks on local files, one file a task, through lm-eval.

A row of a file is {query, choices, gold}, and gold is the number of the right choice. The answer is the choice that is
likeliest after the query and a space. Where rows have ``contexts`` and a ``continuation`` (WinoGrande), the answer is
the context after which the continuation is likeliest.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch import nn

from losa.errors import DataError
from losa.evaluation.tasks import evaluate_tasks

# lm-eval knows tasks of its own by the names of the files.
PREFIX = "local_"


def local_tasks(model: nn.Module, tokenizer, folder: Path, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Accuracy ``acc`` and its standard error ``acc_stderr`` by the file's name, of each .jsonl file of ``folder``.

    Args:
        limit: use only the first examples of each file.

    Raises:
        DataError: there is no such file, or a row is of another format.
        LosaError: lm-eval is not installed.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"zero-shot tasks: expected .jsonl files in {folder}, found none")
    with tempfile.TemporaryDirectory() as made:
        for file in files:
            # JSON is YAML too.
            (Path(made) / f"{file.stem}.yaml").write_text(json.dumps(task_settings(file)))
        found = evaluate_tasks(model, tokenizer, [PREFIX + file.stem for file in files], [made], limit=limit)
    return {task.removeprefix(PREFIX): metrics for task, metrics in found.items()}


def task_settings(file: Path) -> dict:
    """What lm-eval is told of a file. Raises DataError: its first row is of another format."""
    with file.open(encoding="utf-8") as lines:
        first = next(lines, "")
    try:
        row = json.loads(first)
        contexts = "contexts" in row
        wanted = {"gold", "contexts", "continuation"} if contexts else {"gold", "query", "choices"}
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: expected a JSON object in each line, got {first[:80]!r}") from error
    if not isinstance(row, dict) or wanted - row.keys():
        raise DataError(f"{file}: expected rows with {', '.join(sorted(wanted))}, got {first[:80]!r}")
    # To lm-eval a number as text means that the choices are texts, and that the target follows each of them.
    text, choices, target = ("gold", "contexts", "continuation") if contexts else ("query", "choices", "gold")
    return {
        "task": PREFIX + file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": target,
        # A continuation begins with its own space.
        "target_delimiter": "" if contexts else " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
