"""Wanda by the book, without losa: whole forward passes of transformers, hooks, and one block after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def wanda_by_the_book(model: nn.Module, blocks: Iterable[nn.Module], ids: Tensor, sparsity: float) -> dict[str, Tensor]:
    """Prune a model's blocks in place: each row of a linear loses the share ``sparsity`` of its weights that have the
    lowest |w_ij| ||x_j||, x being what the linear gets in the model whose earlier blocks are pruned.

    Returns:
        scores (out, in) fp64 of every linear that was called, by full name.
    """
    names = {module: name for name, module in model.named_modules()}
    scores: dict[str, Tensor] = {}
    for block in blocks:
        squares: dict[nn.Module, Tensor] = {}

        def see(module, args, squares=squares):
            squares[module] = squares.get(module, 0) + args[0].double().flatten(0, -2).square().sum(0)

        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        handles = [linear.register_forward_pre_hook(see) for linear in linears]
        for sample in ids:
            model(sample[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for linear, square in squares.items():
            score = linear.weight.double().abs() * square.sqrt()
            scores[names[linear]] = score
            lowest = score.sort(dim=1, stable=True).indices[:, : int(sparsity * score.shape[1])]
            linear.weight.scatter_(1, lowest, 0)
    return scores


def check_mask(kept: Tensor, scores: Tensor, sparsity: float) -> None:
    """Each row keeps as many as it should, and none that is worse than one that went; scores that are equal up to fp32
    sums of squares may change places."""
    assert int((~kept).sum(1).unique()) == int(sparsity * kept.shape[1])
    worst_kept = scores.masked_fill(~kept, float("inf")).amin(1)
    best_gone = scores.masked_fill(kept, 0).amax(1)
    assert bool((best_gone <= worst_kept * (1 + 64 * torch.finfo(torch.float32).eps)).all())


def nll(model: nn.Module, ids: Tensor) -> float:
    """Mean over next tokens."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
