"""Perplexity as the pruning papers measure it, and zero-shot tasks through lm-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from losa.errors import DataError, LosaError, NumericsError


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(``nll``), the mean over all predicted tokens; ``tokens`` = windows x length."""

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

    Every window predicts its last length - 1 tokens, without context from the window before.

    Args:
        model: causal LM (left in the mode it was in); tokens: (tokens,) int64.
        batch_size: windows per forward pass; max_windows: use only the first ones.

    Raises:
        DataError: less text than one window. NumericsError: a non-finite loss.
    """
    windows = len(tokens) // length
    if windows == 0:
        raise DataError(f"evaluate.length: expected at most the text's {len(tokens)} tokens, got {length}")
    if max_windows is not None:
        windows = min(windows, max_windows)
    batches = tokens[: windows * length].reshape(windows, length).split(batch_size)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in tqdm(batches, desc="perplexity", disable=not progress, leave=False):
        batch = batch.to(device)
        logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += F.cross_entropy(logits.float(), batch[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    nll = total / (windows * (length - 1))
    if not math.isfinite(nll):
        raise NumericsError(f"evaluation: the loss is {nll}")
    return Perplexity(math.exp(min(nll, 700.0)), nll, windows, windows * length, length)


def evaluate_tasks(model: nn.Module, tokenizer, tasks: Sequence[str], task_paths: Sequence[str] = ()) -> dict:
    """Zero-shot accuracy through lm-eval: {task: {metric: value}}, ``acc`` and not ``acc_norm``, as in the paper.

    ``task_paths``: directories with task YAML files of your own.

    Raises:
        LosaError: lm-eval is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LosaError("tasks: lm-eval is not installed; pip install 'losa[eval]'") from error
    manager = TaskManager(include_path=list(task_paths) or None)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise LosaError(f"tasks: unknown {', '.join(unknown)}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)
    return {
        task: {k.split(",")[0]: v for k, v in values.items() if isinstance(v, float) and not k.startswith("acc_norm")}
        for task, values in found["results"].items()
    }
