"""Zero-shot tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from losa.errors import LosaError

# An accuracy's standard error is a formula, but lm-eval computes none without samples for metrics that have no formula.
_BOOTSTRAPS = 100


def evaluate_tasks(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str],
    task_paths: Sequence[str | Path] = (),
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Zero-shot tasks through lm-eval (the optional extra ``eval``).

    Args:
        tasks: lm-eval's names; the paper's seven are hellaswag, winogrande, boolq, openbookqa, piqa, arc_easy and
            arc_challenge.
        task_paths: directories with task YAML files of your own.
        limit: use only the first examples of each task.

    Returns:
        {task: {metric: value}}. Accuracy is ``acc``, as the paper reports it; the length-normalised ``acc_norm`` is
        left out. A metric of another filter than lm-eval's default is named "metric,filter". The standard error of a
        metric is beside it, as "metric_stderr", where lm-eval computes one.

    Raises:
        LosaError: lm-eval is not installed, a directory is missing, or a task is unknown.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LosaError("tasks: lm-eval is not installed; pip install 'losa[eval]'") from error
    if missing := [str(path) for path in task_paths if not Path(path).is_dir()]:
        raise LosaError(f"task_paths: no such directory: {', '.join(missing)}")
    manager = TaskManager(include_path=[str(path) for path in task_paths] or None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise LosaError(f"tasks: lm-eval knows no {', '.join(unknown)}; list its tasks, or give their task_paths")
    was_training = model.training
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=0, limit=limit, bootstrap_iters=_BOOTSTRAPS
        )
    finally:
        model.train(was_training)
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict) -> dict[str, float]:
    """Plain accuracies and the like out of lm-eval's values, whose keys are "metric,filter"."""
    chosen = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and metric.removesuffix("_stderr") != "acc_norm" and filtered:
            chosen[metric if filtered == "none" else key] = float(value)
    return chosen
