"""Wanda by the book, without losa: whole forward passes of transformers, hooks, and one block after the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def wanda_by_the_book(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    ids: Tensor,
    sparsity: float,
    leave: tuple[str, ...] = (),
    batch_size: int = 1,
) -> dict[str, Tensor]:
    """Prune a model's blocks in place: each row of a linear loses the share ``sparsity`` of its weights that have the
    lowest |w_ij| ||x_j||, x being what the linear gets in the model whose earlier blocks are pruned. A linear of an
    expert gets the tokens that chose it; of one that no token chose the weights alone count. ``leave``: ends of the
    names of linears that stay as they are. ``batch_size``: samples of a pass, which matter to Doge's experts alone.

    Returns:
        scores (out, in) fp64 of every linear that was called, by full name.
    """
    names = {module: name for name, module in model.named_modules()}
    scores: dict[str, Tensor] = {}
    for block in blocks:
        squares: dict[str, Tensor] = {}
        handles = []
        for module in block.modules():
            for kinds, see in SEEN:
                if isinstance(module, kinds):
                    handles.append(module.register_forward_pre_hook(partial(see, squares, names[module])))
        with _experts_one_by_one(model, names, squares):
            for batch in ids.split(batch_size):
                model(batch, use_cache=False)
        for handle in handles:
            handle.remove()
        for name, weight in matrices(block, names).items():
            square = squares.get(name)
            if leave and name.endswith(leave):
                continue
            if square is None and not re.search(r"\.\d+\.\w+$", name.partition("layers.")[2].partition(".")[2]):
                continue
            score = weight.double().abs() * (1 if square is None else square.sqrt())
            scores[name] = score
            lowest = score.sort(dim=1, stable=True).indices[:, : int(sparsity * score.shape[1])]
            weight.mul_(torch.ones_like(weight).scatter_(1, lowest, 0))
    return scores


def matrices(block: nn.Module, names: dict[nn.Module, str]) -> dict[str, Tensor]:
    """The weights (out, in) of a block's linears, experts and transposed linears, as views, by full name."""
    found: dict[str, Tensor] = {}
    for module in block.modules():
        if isinstance(module, nn.Linear):
            found[names[module]] = module.weight
        elif isinstance(module, Conv1D):
            found[names[module]] = module.weight.T
        elif "down_proj" in module._parameters and (hasattr(module, "gate_up_proj") or hasattr(module, "has_gate")):
            for e in range(len(module.down_proj)):
                found |= {f"{names[module]}.{e}.{part}": weight for part, weight in _of_expert(module, e).items()}
        elif isinstance(module, DbrxExperts):
            for e in range(module.num_experts):
                found |= {f"{names[module]}.{e}.{part}": weight for part, weight in _of_expert(module, e).items()}
        elif isinstance(module, JetMoeParallelExperts):
            found |= {f"{names[module]}.{e}.linear": weight for e, weight in enumerate(module.weight)}
    return found


def _of_expert(stack, e: int) -> dict[str, Tensor]:
    if isinstance(stack, DbrxExperts):
        gate, up, down = (
            w.view(stack.num_experts, -1, w.shape[1])[e] for w in (stack.mlp.w1, stack.mlp.v1, stack.mlp.w2)
        )
        return {"gate_proj": gate, "up_proj": up, "down_proj": down.T}
    if not getattr(stack, "has_gate", True):
        up, down = stack.up_proj[e], stack.down_proj[e]
        return {"up_proj": up.T, "down_proj": down.T} if stack.is_transposed else {"up_proj": up, "down_proj": down}
    both, down = stack.gate_up_proj[e], stack.down_proj[e]
    if getattr(stack, "is_transposed", not isinstance(stack, LongcatFlashExperts)):
        both, down = both.T, down.T
    half = len(both) // 2
    gate, up = (both[:half], both[half:]) if getattr(stack, "is_concatenated", True) else (both[::2], both[1::2])
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def _see_llama4(squares: dict[str, Tensor], name: str, module: Any, args: tuple) -> None:
    for e, x in enumerate(args[0].view(len(module.down_proj), -1, args[0].shape[-1])):
        _add_expert(squares, f"{name}.{e}", x, _of_expert(module, e), module.act_fn)


def _see_routed(squares: dict[str, Tensor], name: str, module: Any, args: tuple) -> None:
    hidden, chosen, _ = args
    dbrx = isinstance(module, DbrxExperts)
    for e in range(module.num_experts if dbrx else module.num_routed_experts):
        x = hidden.flatten(0, -2)[(chosen == e).any(1)]
        if len(x):
            act = module.mlp.activation_fn if dbrx else module.act_fn
            _add_expert(squares, f"{name}.{e}", x, _of_expert(module, e), act)


def _add_expert(squares: dict[str, Tensor], name: str, x: Tensor, part: dict[str, Tensor], act: Any) -> None:
    inner = F.linear(x, part["up_proj"]) * act(F.linear(x, part["gate_proj"]))
    for each, seen in (("gate_proj", x), ("up_proj", x), ("down_proj", inner)):
        _add(squares, f"{name}.{each}", seen)


def _see_jetmoe(squares: dict[str, Tensor], name: str, module: Any, args: tuple) -> None:
    for e, x in enumerate(args[0].split(args[1])):
        _add(squares, f"{name}.{e}.linear", x)


def _see_linear(squares: dict[str, Tensor], name: str, module: nn.Module, args: tuple) -> None:
    _add(squares, name, args[0])


def _add(squares: dict[str, Tensor], name: str, x: Tensor) -> None:
    squares[name] = squares.get(name, 0) + x.double().flatten(0, -2).square().sum(0)


SEEN = (
    ((nn.Linear, Conv1D), _see_linear),
    (Llama4TextExperts, _see_llama4),
    ((DbrxExperts, LongcatFlashExperts), _see_routed),
    (JetMoeParallelExperts, _see_jetmoe),
)


@contextmanager
def _experts_one_by_one(model, names: dict[nn.Module, str], squares: dict[str, Tensor]) -> Iterator[None]:
    """Within the context experts compute in a loop of their own, which sees what each linear gets."""

    def forward(stack, hidden, chosen, shares):
        out = torch.zeros_like(hidden)
        for e in range(len(stack.down_proj)):
            token, place = torch.where(chosen == e)
            if not len(token):
                continue
            part, name = _of_expert(stack, e), f"{names[stack]}.{e}"
            if stack.has_gate:
                bias = stack.gate_up_proj_bias[e] if stack.has_bias else None
                both = stack.gate_up_proj[e].T if stack.is_transposed else stack.gate_up_proj[e]
                inner = stack._apply_gate(F.linear(hidden[token], both, bias))
            else:
                bias = stack.up_proj_bias[e] if stack.has_bias else None
                inner = stack.act_fn(F.linear(hidden[token], part["up_proj"], bias))
            y = F.linear(inner, part["down_proj"], stack.down_proj_bias[e] if stack.has_bias else None)
            for each in part:
                _add(squares, f"{name}.{each}", inner if each == "down_proj" else hidden[token])
            out.index_add_(0, token, y * shares[token, place, None])
        return out

    ALL_EXPERTS_FUNCTIONS.register("book", forward)
    config = model.config.get_text_config()
    before = config._experts_implementation
    config._experts_implementation = "book"
    try:
        yield
    finally:
        config._experts_implementation = before


def check_mask(kept: Tensor, scores: Tensor, sparsity: float) -> None:
    """Each row keeps as many as it should, and none that is worse than one that went; scores that are equal up to fp32
    sums of squares may change places."""
    assert int((~kept).sum(1).unique()) == int(sparsity * kept.shape[1])
    worst_kept = scores.masked_fill(~kept, float("inf")).amin(1)
    best_gone = scores.masked_fill(kept, 0).amax(1)
    assert bool((best_gone <= worst_kept * (1 + 64 * torch.finfo(torch.float32).eps)).all())
