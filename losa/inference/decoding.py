"""The lean loop: a static key-value cache and a handful of calls per block, no framework's hundreds.

Reads the blocks of a transformers decoder of the LLaMA kind (RMS norms, rotary positions, grouped-query attention, and
a gated MLP; another MLP, or a mixture of experts, is called as a whole), dense or packed. The name of a model does not
decide whether it is of that kind: every key of its configuration must be known (``lean_config``), the loop must read
all weights, and its logits are compared with the model's own on some tokens. Other models generate through
transformers.

On a GPU single tokens go through ``LeanDecoder.step``, whose blocks are nine launches each, as a CUDA graph
(``losa.inference.token_graphs``), unless a block's MLP is called as a whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losa.errors import LosaError, ModelError
from losa.inference.decoder_blocks import Block, Norm, product, read_block
from losa.inference.lean_config import Unsupported, longest_served
from losa.inference.token_graphs import TokenGraphs, graphs_for, places_for
from losa.model.blocks import find_blocks
from losa.modules.sparse import SparseLinear
from losa.modules.watching import is_watched
from losa_kernels import decoder_step, dispatch
from losa_kernels.sparse_linear import WITH_KERNELS

# The loop reads tensors of a block whose names begin like this.
READ = (
    *("input_layernorm.", "post_attention_layernorm.", "self_attn.q_norm.", "self_attn.k_norm."),
    *("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.", "self_attn.o_proj."),
    *("mlp.gate_proj.", "mlp.up_proj.", "mlp.down_proj."),
)

# Allowed difference of logits, as a share of the largest logit. Rounding errors of both sides pass through every block,
# and the first tokens have large values: with 30 blocks fp32 differs from fp64 by 2e-5. Another function differs by
# more than a thousandth.
SAME = 2**-10
# Tokens of the comparison. Models of LARGE weights and more take SHORT_PROBE, since the comparison would take seconds;
# so does half precision on a CPU, which may compute it slowly.
PROBE, SHORT_PROBE, LARGE = 64, 16, 500_000_000


class LeanDecoder:
    """One sequence at a time through a decoder of the LLaMA kind.

    On a GPU, call ``resize`` after tensors of the model were replaced (``to``, ``load_state_dict(assign=True)``):
    graphs read the memory that they were captured with.

    Args:
        model: a transformers causal LM, dense or after ``losa.sparsify``; used as it is, not copied. For linears with
            the same input, biases, packed weights and on a GPU dense weights move next to each other in memory.
        max_length: how many tokens of prompt and continuation the cache has room for.

    Raises:
        Unsupported: the model is of another kind; says what differs.
    """

    def __init__(self, model: Any, max_length: int):
        try:
            self.config = model.config
            decoder = model.get_decoder()
            self.embeddings, self.head = model.get_input_embeddings(), model.get_output_embeddings()
            first = self.embeddings.weight
            self.device, self.dtype = first.device, first.dtype
            blocks = find_blocks(model)
            attention: Any = blocks.modules[0].self_attn
            self.head_dim: int = attention.head_dim
            self.key_heads: int = attention.k_proj.out_features // self.head_dim
            self.query_heads: int = attention.q_proj.out_features // self.head_dim
            self.blocks = [read_block(block) for block in blocks]
            self._windows = [getattr(block.self_attn, "sliding_window", None) for block in blocks]
            self.norm, self.rotary = Norm(decoder.norm), decoder.rotary_emb
            self._logits_of = product(self.head)
            called = [f"{name}.mlp." for name, own in zip(blocks.names, self.blocks, strict=True) if own.mlp.is_called]
            _check_parts(model, blocks.prefix, [self.embeddings, self.head, decoder.norm], called)
        except (AttributeError, NotImplementedError, ModelError) as error:
            # transformers raises NotImplementedError for a model without input embeddings.
            raise Unsupported(f"generate: {type(model).__name__} is built differently ({error})") from error
        self.graphs: TokenGraphs | None = None
        self.logits: Any = None  # a tensor from the first call on
        self._recordable = not called and _recordable(model, self.device)
        # By torch's operations, as of fp64 on a CPU, a step of static shapes costs more than one that knows its place.
        backend = dispatch.backend("add_rms_norm", self.device)
        self._steps = backend == "cuda" or (backend == "cpu" and self.dtype != torch.float64)
        self._check_length(max_length)
        self._check(model)
        self.resize(max_length)

    def resize(self, max_length: int) -> None:
        """Forget all tokens, and make room for ``max_length`` tokens; 0 frees the cache and the graphs.

        Raises:
            Unsupported: the model's attention has a window shorter than ``max_length``.
            LosaError: the cache does not fit into memory.
        """
        self._check_length(max_length)
        if self.graphs is not None:
            self.graphs.close()
        self.graphs = graphs_for(self.device) if max_length and self._recordable else None
        shape = (len(self.blocks), 2, 1, self.key_heads, max_length, self.head_dim)
        self._caches: list[Tensor] = []
        self.cache = torch.empty(0)  # the old one's memory is freed before the new one is asked for
        self.logits = None
        self.cache = _zeros(shape, self.dtype, self.device)
        self._caches = list(self.cache[:, :, 0])  # for each block (2, key heads, max_length, size)
        positions = torch.arange(max_length, device=self.device)[None]
        cos, sin = self.rotary(torch.empty(1, 1, 1, dtype=self.dtype, device=self.device), positions)
        if cos.shape[-1] != self.head_dim:
            raise Unsupported("generate: rotary positions cover a part of each head only")
        half = self.head_dim // 2
        # rotate_half(x) * sin = roll(x) * (-sin, sin), which is one operation fewer.
        self.cos, self.sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        self._run = decoder_step.operations(self.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._finished = torch.zeros(self.query_heads, dtype=torch.int32, device=self.device)
        self.max_length, self.length = max_length, 0

    def _check_length(self, max_length: int) -> None:
        window = self._shortest_window() if max_length else None
        if window is not None and max_length > window:
            raise Unsupported(
                f"generate: attention in a sliding window of {window} tokens, fewer than the {max_length} of this text"
            )

    def _shortest_window(self) -> int | None:
        windows = [*self._windows, longest_served(self.config)]
        return min((window for window in windows if window is not None), default=None)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
        if self.graphs is not None:
            self.cache.zero_()

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids (tokens,), which follow the tokens read so far -> logits (vocabulary,) of the last one. ``logits`` of the
        decoder is the same tensor, which the next call may overwrite.

        Raises:
            LosaError: the cache is full.
        """
        graphs = self._graphed(ids) if len(ids) == 1 else None
        logits = self._logits(ids, last=True)[-1] if graphs is None else graphs.logits
        self.logits = logits
        return logits

    @torch.inference_mode()
    def likeliest(self, token: Tensor) -> Tensor:
        """token (1,), which follows the tokens read so far -> the likeliest next token, (1,), which the next call may
        overwrite. Nothing waits for the device, unless an MLP that is called as a whole does.

        Raises:
            LosaError: the cache is full.
        """
        if (graphs := self._graphed(token)) is not None:
            self.logits = graphs.logits
            return graphs.token
        logits = self._logits(token, last=True)[-1]
        self.logits = logits
        return logits.argmax(-1, keepdim=True)

    def _graphed(self, token: Tensor) -> TokenGraphs | None:
        """The graphs if one of them has read the token, else None."""
        if self.graphs is None:
            return None
        self._check_room(1)
        if not self.graphs.run(self.step, token, self.length):
            return None
        self.length += 1
        return self.graphs

    def step(self, token: Tensor, position: Tensor, places: int) -> Tensor:
        """Read one token, in shapes that do not depend on its position and without waiting: a graph can hold it.

        Args:
            token, position: (1,) int64 on the model's device. Keys and values go to this position of the cache.
            places: how many positions of the cache the launches are sized for, more than ``position``. The whole cache
                if it has fewer.

        Returns:
            logits (vocabulary,).
        """
        x, update, places = self.embeddings(token), None, min(places, self.max_length)
        for block, cache in zip(self.blocks, self._caches, strict=True):
            update = block.step(x, update, self.cos, self.sin, position, cache, places, self._finished, self._run)
        return self._logits_of(self.norm.after(x, update, self._run))[0]

    def _check_room(self, tokens: int) -> None:
        needed = self.length + tokens
        if needed > self.max_length:
            raise LosaError(f"generate: {needed} tokens are more than max_length, {self.max_length}")

    def _logits(self, ids: Tensor, last: bool) -> Tensor:
        """ids (tokens,) -> logits (tokens, vocabulary), or (1, vocabulary) of the last token."""
        self._check_room(len(ids))
        if len(ids) == 1 and self._steps:
            self._position.fill_(self.length)
            logits = self.step(ids, self._position, places_for(self.length + 1))
            self.length += 1
            return logits[None]
        start, stop = self.length, self.length + len(ids)
        x = self.embeddings(ids[None])
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x = block.feed_forward(x + block.out(self._attention(block, x, cache, cos, sin, start, stop)))
        self.length = stop
        return self._logits_of(self.norm(x[0, -1:] if last else x[0]))

    def _attention(
        self, block: Block, x: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, start: int, stop: int
    ) -> Tensor:
        tokens, queries, keys = x.shape[1], self.query_heads, self.key_heads
        heads = block.heads(block.attention_norm(x), queries, keys).transpose(1, 2)
        turned = heads[:, : queries + keys]
        turned = turned * cos + turned.roll(self.head_dim // 2, -1) * sin
        cache[0, :, :, start:stop] = turned[:, queries:]
        cache[1, :, :, start:stop] = heads[:, queries + keys :]
        q, k, v = turned[:, :queries], cache[0, :, :, :stop], cache[1, :, :, :stop]
        if tokens == 1:
            # Queries of one key head are rows of one product, so that no key is repeated and nothing is masked.
            grouped = q.reshape(1, keys, queries // keys, self.head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, scale=block.scaling).reshape(1, 1, -1)
        mask = None
        if start:
            mask = torch.ones(tokens, stop, dtype=torch.bool, device=q.device).tril(start)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=block.scaling, enable_gqa=queries != keys
        )
        return attended.transpose(1, 2).reshape(1, tokens, -1)

    @torch.inference_mode()
    def _check(self, model: nn.Module) -> None:
        """Raises Unsupported unless the loop gives the model's logits, for tokens read at once and one by one."""
        weights = sum(getattr(m, "in_features", 0) * getattr(m, "out_features", 0) for m in model.modules())
        weights += sum(p.numel() for p in model.parameters() if p.ndim > 2)  # stacks of experts
        slow = weights >= LARGE or (self.device.type == "cpu" and self.dtype.itemsize < 4)
        count = SHORT_PROBE if slow else PROBE
        window = self._shortest_window()
        count = count if window is None else min(count, window)
        vocabulary = self.embeddings.weight.shape[0]
        # Tokens spread over the vocabulary, with the first and the last one.
        ids = (torch.arange(count, device=self.device) * 0.6180339887 % 1 * vocabulary).long()
        ids[count // 2] = vocabulary - 1
        try:
            self.resize(count)
            expected = model(ids[None], use_cache=False).logits[0].float()
            before = [self._logits(part, last=False) for part in (ids[:-2], ids[-2:-1]) if len(part)]
            found = torch.cat([*before, self(ids[-1:])[None]]).float()
        except LosaError:
            raise
        except Exception as error:  # an error of the model's own code, or shapes that do not fit the loop
            raise Unsupported(f"generate: {type(model).__name__} is built differently ({error})") from error
        if not expected.isfinite().all():
            raise Unsupported(f"generate: {type(model).__name__}'s own logits are not finite for some tokens")
        allowed = max(64 * torch.finfo(self.dtype).eps, SAME) * expected.abs().max()
        if found.shape != expected.shape or not (found - expected).abs().max() <= allowed:
            raise Unsupported(f"generate: {type(model).__name__} computes something else than a plain LLaMA block")


def _check_parts(model: nn.Module, prefix: str, others: Sequence[nn.Module], called: list[str]) -> None:
    """Raises Unsupported unless the loop reads every weight of the model: weights of the blocks at ``prefix`` whose
    names are in ``READ`` or begin as one of ``called``, and all weights of ``others``."""
    read = {id(parameter) for module in others for parameter in module.parameters()}
    packed = {f"{name}.packed": module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for name, weight in (dict(model.named_parameters()) | packed).items():
        inside = name.removeprefix(f"{prefix}.")
        known = name.startswith(tuple(called)) or inside.partition(".")[2].startswith(READ)
        if id(weight) not in read if inside == name else not known:
            raise Unsupported(f"generate: the lean loop does not read {name} of {type(model).__name__}")


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    needed = math.prod(shape) * dtype.itemsize
    message = (
        f"generate: the cache for {shape[-2]:,} tokens does not fit into memory ({needed / 1e9:.1f} GB); give a "
        "smaller max_new_tokens or a shorter prompt"
    )
    # Linux grants more memory than the machine has, and kills the process that uses it.
    if device.type == "cpu" and needed > (_memory() or needed):
        raise LosaError(message)
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # torch raises it when memory of any kind is short
        raise LosaError(message) from error


def _memory() -> int | None:
    """Bytes of memory of this machine; None where the operating system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def hooked(model: nn.Module) -> bool:
    """Whether a forward method was replaced or a module has hooks. What such code computes can change unnoticed."""
    return any(map(is_watched, model.modules()))


def _recordable(model: nn.Module, device: torch.device) -> bool:
    """Whether a step consists of kernels alone. A replay runs no hook, and packed weights without kernels may be
    unpacked by operations that the host waits for."""
    if hooked(model):
        return False
    packed = {type(module.packed) for module in model.modules() if isinstance(module, SparseLinear)}
    return not packed or (packed <= set(WITH_KERNELS) and dispatch.backend("sparse_linear", device) != "reference")
