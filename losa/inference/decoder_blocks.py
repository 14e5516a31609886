"""The parts of a transformers decoder block of the LLaMA kind, as the lean loop calls them. Shapes: (..., features)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa.modules.sparse import SparseLinear, share_rows
from losa.modules.watching import is_watched
from losa_kernels import dispatch, sparse_linear
from losa_kernels.decoder_step import Operations

SILU = ("SiLU", "SiLUActivation")  # names of the activation's class in torch and in transformers


class Norm:
    """A norm of the model. transformers' RMS norm is computed in one call, where its module makes six."""

    def __init__(self, module: nn.Module):
        self.eps: float | None = getattr(module, "variance_epsilon", None)
        self.weight: Any = None if self.eps is None else module.weight  # a Tensor where there is an eps
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self._module(x) if self.eps is None else F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x: Tensor, update: Tensor | None, run: Operations) -> Tensor:
        """Add ``update`` to x in place, unless it is None, and return the norm of x."""
        if self.eps is not None:
            return run.add_rms_norm(x, update, self.weight, self.eps)
        return self._module(x if update is None else x.add_(update))


@dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate) * up), gate and up as one product."""

    gate_up: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    is_called = False

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)

    def step(self, x: Tensor, run: Operations) -> Tensor:
        """One token (1, hidden), by the operations of a decode step."""
        if type(self.activation).__name__ in SILU:
            return self.down(run.gated_silu(self.gate_up(x)))
        return self(x)


@dataclass(frozen=True)
class CalledMLP:
    """The model's own module: experts of a mixture, of which a token reads those that it chose, or an MLP of another
    kind. What it does is unknown: it may make the host wait, so that no graph can hold it."""

    module: nn.Module
    is_called = True

    def __call__(self, x: Tensor) -> Tensor:
        found = self.module(x)
        return found if isinstance(found, Tensor) else found[0]

    def step(self, x: Tensor, run: Operations) -> Tensor:
        """One token (1, hidden)."""
        return self(x[None])[0]


@dataclass(frozen=True)
class Block:
    attention_norm: Norm
    mlp_norm: Norm
    qkv: Callable[[Tensor], Tensor]
    q_norm: Norm | None
    k_norm: Norm | None
    out: Callable[[Tensor], Tensor]  # (..., hidden) from (..., attended)
    attended: int  # heads times their size
    mlp: GatedMLP | CalledMLP
    scaling: float

    def heads(self, x: Tensor, queries: int, keys: int) -> Tensor:
        """x (..., hidden) after the norm -> queries, keys and values (..., heads, size), with the norms of heads that
        the model has."""
        heads = self.qkv(x).view(*x.shape[:-1], queries + 2 * keys, -1)
        if self.q_norm is None or self.k_norm is None:
            return heads
        q, k, v = heads.split((queries, keys, keys), -2)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], -2)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mlp_norm(x))

    def step(
        self,
        x: Tensor,
        update: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        position: Tensor,
        cache: Tensor,
        places: int,
        finished: Tensor,
        run: Operations,
    ) -> Tensor:
        """One token. On a GPU these are at most nine launches, where q, k and v, and gate and up, are one product each;
        a ``CalledMLP`` has launches of its own.

        Args:
            x: (1, hidden), the residual stream; changed in place.
            update: (1, hidden), what the previous block adds to x.
            cos, sin, position, cache, places, finished: see ``losa_kernels.decoder_step``.

        Returns:
            (1, hidden), what this block's MLP adds to x.
        """
        keys, size = cache.shape[1], cache.shape[3]
        normed = self.attention_norm.after(x, update, run)
        norms = self._head_norms(size)
        if norms is None:
            q_norm, k_norm, eps, queries = None, None, 0.0, self.attended // size
            heads = self.heads(normed, queries, keys)[0]
        else:
            (q_norm, k_norm, eps), heads = norms, self.qkv(normed).view(-1, size)
        q = run.rotate_and_store(heads, cos, sin, position, cache, q_norm, k_norm, eps)
        attended = run.attend_cache(q, cache, position, places, self.scaling, finished)
        normed = self.mlp_norm.after(x, self.out(attended.view(1, -1)), run)
        return self.mlp.step(normed, run)

    def _head_norms(self, size: int) -> tuple[Tensor | None, Tensor | None, float] | None:
        """Weights and eps of the RMS norms of heads (no weights: the model has none); None: the norms are of another
        kind."""
        q, k = self.q_norm, self.k_norm
        if q is None or k is None:
            return None, None, 0.0
        if q.eps is None or q.eps != k.eps or not q.weight.shape == k.weight.shape == (size,):
            return None
        return q.weight, k.weight, q.eps


def read_block(block: Any) -> Block:
    """The parts of a transformers block. Raises AttributeError where a part is missing or has another name."""
    attention, mlp = block.self_attn, block.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Block(
        attention_norm=Norm(block.input_layernorm),
        mlp_norm=Norm(block.post_attention_layernorm),
        qkv=_together([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=None if q_norm is None else Norm(q_norm),
        k_norm=None if k_norm is None else Norm(k_norm),
        out=product(attention.o_proj),
        attended=attention.o_proj.in_features,
        mlp=_read_mlp(mlp),
        scaling=attention.scaling,
    )


def _read_mlp(mlp: Any) -> GatedMLP | CalledMLP:
    if not all(hasattr(mlp, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return CalledMLP(mlp)
    return GatedMLP(_together([mlp.gate_proj, mlp.up_proj]), mlp.act_fn, product(mlp.down_proj))


def product(linear: Any) -> Callable[[Tensor], Tensor]:
    """What calls a linear: of a plain one on a CPU ``dense_linear``, else the module itself."""
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or is_watched(linear):
        return linear
    run = dispatch.implementation("dense_linear", linear.weight.device)
    return lambda x: run(x, linear.weight, linear.bias)


def _together(linears: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """All ``linears`` on one input, with their outputs side by side: one product if their rows lie together in
    memory."""
    group = getattr(linears[0], "group", None)
    if group is None and all(type(linear) is SparseLinear for linear in linears):
        group = share_rows(linears)  # moving or loading the linears has separated them
    if all(type(linear) is nn.Linear and linear.weight.is_cuda for linear in linears):
        join(linears, "weight")  # on a GPU the launches of several products and of a concatenation cost much
    if group is not None and all(getattr(linear, "group", None) is group for linear in linears):
        multiply: Callable[..., Tensor] = sparse_linear
        weight = group
    elif (weight := joined([_rows(linear) for linear in linears])) is not None:
        multiply = dispatch.implementation("dense_linear", weight.device)
    else:
        apart = [product(linear) for linear in linears]
        return lambda x: torch.cat([each(x) for each in apart], -1)
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return lambda x: multiply(x, weight)
    join(linears, "bias")
    biases = [linear.bias for linear in linears]
    bias = joined([None if bias is None else bias.detach() for bias in biases])
    if bias is not None:
        return lambda x: multiply(x, weight, bias)
    zeros = [torch.zeros(linear.out_features, dtype=weight.dtype, device=weight.device) for linear in linears]
    parts = [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
    return lambda x: multiply(x, weight, torch.cat(parts))


def _rows(linear: Any) -> Tensor | None:
    return linear.weight.detach() if type(linear) is nn.Linear else None


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor whose rows are ``parts``, one after the other (see ``join_linears``); None: the parts lie
    elsewhere."""
    whole = [part for part in parts if part is not None]
    if len(whole) < len(parts):
        return None
    first, place = whole[0], whole[0].storage_offset()
    for part in whole:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.dtype == first.dtype
        if not (same and part.is_contiguous() and part.storage_offset() == place):
            return None
        place += part.numel()
    return first.as_strided((sum(len(part) for part in whole), *first.shape[1:]), first.stride())


def join(linears: Sequence[nn.Module], name: str) -> None:
    """Make the parameters or buffers ``name`` of the linears rows of one tensor, if they are alike and memory suffices.
    They remain the same parameters and buffers of the model."""
    parts = [getattr(linear, name) for linear in linears]
    if any(part is None or part.is_inference() for part in parts):
        return
    alike = len({(part.shape[1:], part.dtype, part.device) for part in parts}) == 1
    if not alike or joined([part.detach() for part in parts]) is not None:
        return
    try:
        with torch.inference_mode(False), torch.no_grad():
            for part, rows in zip(parts, torch.cat(parts).split([len(part) for part in parts]), strict=True):
                part.data = rows
    except torch.OutOfMemoryError:
        return
