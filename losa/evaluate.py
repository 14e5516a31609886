"""Perplexity as the pruning papers measure it, and zero-shot tasks through lm-eval."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from losa.errors import DataError, LosaError, NumericsError
from losa.loss import TokenLoss

logger = logging.getLogger("losa")


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(``nll``), ``nll`` the mean in nats over windows x (length - 1) predicted tokens; ``tokens``: the
    text that was read, windows x length."""

    value: float
    nll: float
    windows: int
    tokens: int
    length: int


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    batch_size: int = 1,
    max_windows: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """exp(mean NLL) over non-overlapping windows of ``length`` tokens; the tail is dropped.

    Each window predicts its tokens 2..length from the window alone, as in SparseGPT's and Wanda's code: that code
    weighs windows equally and so do we, for all have the same number of predictions. The model computes in its own
    dtype, the loss in fp32.

    Args:
        model: causal LM; set to evaluation mode and put back.
        tokens: (tokens,) int64, of ``losa.data.evaluation_tokens``.
        batch_size: windows per forward pass.
        max_windows: use only the first ones.
        progress: show a progress bar (in a terminal only).

    Raises:
        DataError: less text than one window.
        NumericsError: a non-finite loss; names the windows.
        ValueError: length below 2, batch_size or max_windows below 1.
    """
    for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    windows = len(tokens) // length
    if windows == 0:
        raise DataError(f"evaluate.data: {len(tokens)} tokens are less than one window of evaluate.length, {length}")
    if max_windows is not None:
        windows = min(windows, max_windows)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit and length > limit:
        logger.warning("evaluate.length: %d is more than the %d positions the model was made for", length, limit)
    batches = tokens[: windows * length].reshape(windows, length).split(batch_size)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        loss = TokenLoss(model)
        bar = tqdm(batches, desc="perplexity", leave=False, disable=None if progress else True)
        for index, batch in enumerate(bar):
            batch = batch.to(device)
            summed = loss(batch, batch).item()
            if not math.isfinite(summed):
                first = index * batch_size
                where = f"windows {first}..{first + len(batch) - 1}" if len(batch) > 1 else f"window {first}"
                raise NumericsError(f"evaluation: the loss is {summed} in {where} of {windows}")
            total += summed
    finally:
        model.train(was_training)
    nll = total / (windows * (length - 1))
    value = math.exp(nll) if nll < math.log(torch.finfo(torch.float64).max) else math.inf
    return Perplexity(value, nll, windows, windows * length, length)


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
        left out. A metric of another filter than lm-eval's default is named "metric,filter".

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
            wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=0, limit=limit, bootstrap_iters=0
        )
    finally:
        model.train(was_training)
    return {task: _metrics(values) for task, values in found["results"].items()}


def _metrics(values: dict) -> dict[str, float]:
    """lm-eval's keys are "metric,filter"."""
    chosen = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and metric != "acc_norm" and not metric.endswith("_stderr") and filtered:
            chosen[metric if filtered == "none" else key] = float(value)
    return chosen
